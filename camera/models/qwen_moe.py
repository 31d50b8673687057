"""Qwen2 and Qwen3 with mixture-of-experts layers (Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B; Qwen3-30B-A3B, 235B-A22B)."""

from camera.models.experts import Config, Experts, Shared, layers_of, whole
from camera.models.family import FAMILIES, Family
from camera.models.gguf import GgufRules, normalised
from camera.models.weight import ATTENTION, LAYER, Weight, When
from camera.models.weights import (
    FFN_NORM,
    GGUF,
    HEAD_NORMS,
    attention_weights,
    decoder,
    dense_weights,
    expert_weights,
)

_WIDTH = "moe_intermediate_size"
_COUNT_KEYS = ("num_experts", "num_local_experts")


def is_sparse(config: Config, layer: int) -> bool:
    """Every `decoder_sparse_step`-th layer that `mlp_only_layers` does not name."""
    step = max(1, whole(config, "decoder_sparse_step", 1))
    return layer not in layers_of(config, "mlp_only_layers") and (layer + 1) % step == 0


FAMILIES.register(
    "qwen2_moe",
    Family(
        model_type="qwen2_moe",
        architecture="Qwen2MoeForCausalLM",
        gguf_architecture="qwen2moe",
        weights=decoder(
            *attention_weights(dict.fromkeys(("query", "key", "value"), When("qkv_bias", default=True))),
            FFN_NORM,
            *dense_weights(layers="dense"),
            *expert_weights(_WIDTH, shared="shared_expert"),
            Weight(
                f"{LAYER}mlp.shared_expert_gate.weight",
                "shared_gate",
                ("1", "hidden_size"),
                f"{GGUF}ffn_gate_inp_shexp.weight",
                layers="sparse",
                exact=True,
            ),
        ),
        experts=Experts(
            count_keys=_COUNT_KEYS,
            chosen_keys=("num_experts_per_tok",),
            width_key=_WIDTH,
            is_sparse=is_sparse,
            shared=Shared("shared_expert", "shared_expert_intermediate_size", gate="shared_expert_gate"),
        ),
        gguf_rules=GgufRules(own_head=True, fixed=(normalised(graph=False, default=False),)),
    ),
)

FAMILIES.register(
    "qwen3_moe",
    Family(
        model_type="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        gguf_architecture="qwen3moe",
        weights=decoder(
            *attention_weights(
                dict.fromkeys(ATTENTION, When("attention_bias", default=False)), norms=HEAD_NORMS
            ),
            FFN_NORM,
            *dense_weights(layers="dense"),
            *expert_weights(_WIDTH),
        ),
        experts=Experts(
            count_keys=_COUNT_KEYS,
            chosen_keys=("num_experts_per_tok",),
            width_key=_WIDTH,
            is_sparse=is_sparse,
        ),
        gguf_rules=GgufRules(fixed=(normalised(graph=True, default=False),)),
    ),
)
