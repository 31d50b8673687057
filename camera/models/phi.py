"""Phi-3, Phi-3.5 and Phi-4 (mini, 14B): query, key and value are one matrix, and so are gate and up."""

from collections.abc import Mapping
from math import log, sqrt
from typing import Any

from camera.models.experts import Config
from camera.models.family import FAMILIES, Family
from camera.models.gguf import Further, GgufRules, Read
from camera.models.weights import FFN_NORM, decoder, fused_attention_weights, fused_dense_weights


def _qkv_size(config: Config) -> int:
    family = FAMILIES["phi3"]
    return family.size(config, "query_size") + 2 * family.size(config, "key_size")


def _rope(config: Config) -> Config:
    """With the numbers that Phi-3 computes from both lengths of context, as Phi-3.5-MoE writes them out."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not given.get("long_factor"):
        return config
    original = int(config["original_max_position_embeddings"])
    longer = given.get("factor") or int(config["max_position_embeddings"]) / original
    scale = given.get("attention_factor") or (sqrt(1 + log(longer) / log(original)) if longer > 1 else 1.0)
    stated = {
        **given,
        "rope_type": "longrope",
        "type": None,
        "original_max_position_embeddings": original,
        "short_mscale": scale,
        "long_mscale": scale,
    }
    return {**config, "rope_parameters": stated}


def _read_length(read: Read, config: Config) -> Mapping[str, Any]:
    scaling = config.get("rope_scaling") or {}
    key = "original_max_position_embeddings"
    return {key: scaling[key]} if key in scaling else {}


FAMILIES.register(
    "phi3",
    Family(
        model_type="phi3",
        architecture="Phi3ForCausalLM",
        gguf_architecture="phi3",
        weights=decoder(*fused_attention_weights(), FFN_NORM, *fused_dense_weights()),
        sizes={"qkv_size": _qkv_size},
        left_out=("original_max_position_embeddings",),
        gguf_rules=GgufRules(rope=_rope, further=Further(lambda config: {}, _read_length)),
    ),
)
