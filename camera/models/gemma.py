"""Gemma, Gemma 2 and Gemma 3 (text): a scaled embedding, norms that multiply by one more than their weight, and GeGLU.

Gemma 2 bounds scores and logits; in both later ones some layers see a window, and Gemma 3 turns those by angles of their own.
"""

from collections.abc import Mapping
from dataclasses import replace
from math import sqrt
from typing import Any

from camera.models.experts import Config
from camera.models.family import FAMILIES, Family
from camera.models.gguf import FULL, SLIDING, Activation, Further, GgufRules, Number, Read, Stated, Window
from camera.models.scales import Scales
from camera.models.weight import ATTENTION, Weight, When
from camera.models.weights import (
    HEAD_NORMS,
    attention_weights,
    decoder,
    decoder_weights,
    dense_weights,
    norm,
    post_norms,
)

_BIASES = dict.fromkeys(ATTENTION, When("attention_bias", default=False))
_GELU = ("gelu_pytorch_tanh", "gelu_python_tanh")
_LEFT_OUT = ("head_dim", "tie_word_embeddings")
_OF_WINDOWS = ("query_pre_attn_scalar", "hidden_activation", "sliding_window", "layer_types")


def _scale(config: Config) -> float:
    return sqrt(config["hidden_size"])


def _plus_one(weights: tuple[Weight, ...]) -> tuple[Weight, ...]:
    """A GGUF file holds what the norms multiply by."""
    return tuple(
        replace(weight, stored_plus=1.0) if weight.role.endswith("norm") else weight for weight in weights
    )


def _scores(config: Config, layers_of_largest: int) -> int:
    """What llama.cpp divides scores by the root of."""
    if int(config["num_hidden_layers"]) == layers_of_largest:
        return int(config["hidden_size"]) // int(config["num_attention_heads"])
    return int(config["head_dim"])


def _untied(config: Config) -> str | None:
    return None if config["tie_word_embeddings"] else "it takes the embedding for the output head"


def _refuses(layers_of_largest: int, config: Config) -> str | None:
    divides = _scores(config, layers_of_largest)
    if config["query_pre_attn_scalar"] != divides:
        return f"query_pre_attn_scalar is {config['query_pre_attn_scalar']}, and it takes {divides} in a model of such sizes"
    if config.get("use_bidirectional_attention"):
        return "use_bidirectional_attention is true, and it lets tokens see those before them only"
    return None


FAMILIES.register(
    "gemma",
    Family(
        model_type="gemma",
        architecture="GemmaForCausalLM",
        gguf_architecture="gemma",
        weights=_plus_one(decoder_weights(_BIASES)),
        scales=Scales(embedding=_scale),
        left_out=_LEFT_OUT,
        gguf_rules=GgufRules(
            activation=Activation("hidden_act", ("gelu_pytorch_tanh", "gelu")), refuses=_untied
        ),
    ),
)


def _with_all_norms(norms: tuple[Weight, ...] = ()) -> tuple[Weight, ...]:
    return _plus_one(
        decoder(
            *attention_weights(_BIASES, norms=norms),
            *post_norms(),
            norm("ffn_norm", "pre_feedforward_layernorm", "ffn_norm"),
            *dense_weights(),
        )
    )


FAMILIES.register(
    "gemma2",
    Family(
        model_type="gemma2",
        architecture="Gemma2ForCausalLM",
        gguf_architecture="gemma2",
        weights=_with_all_norms(),
        scales=Scales(embedding=_scale, softcap="final_logit_softcapping"),
        attention="eager",
        left_out=(*_LEFT_OUT, *_OF_WINDOWS, "attn_logit_softcapping", "final_logit_softcapping"),
        gguf_rules=GgufRules(
            activation=Activation("hidden_activation", _GELU),
            window=Window(2, assumed=lambda layers: 4096),
            stated=(
                Stated("attn_logit_softcapping", "attn_logit_softcapping", 50.0),
                Stated("final_logit_softcapping", "final_logit_softcapping", 30.0),
            ),
            further=Further(
                lambda config: {}, lambda read, config: {"query_pre_attn_scalar": _scores(config, 46)}
            ),
            refuses=lambda config: _untied(config) or _refuses(46, config),
        ),
    ),
)


def _rope_of(config: Config, kind: str) -> Mapping[str, Any]:
    rope: Mapping[str, Any] = config["rope_parameters"][kind]
    return rope


def _thetas(config: Config) -> Mapping[str, Number]:
    return {"rope.freq_base_swa": float(_rope_of(config, SLIDING)["rope_theta"])}


def _read_ropes(read: Read, config: Config) -> Mapping[str, Any]:
    local = {"rope_type": "default", "rope_theta": read("rope.freq_base_swa", float, 10000.0)}
    full = {"rope_type": "default", **(config.get("rope_scaling") or {}), "rope_theta": config["rope_theta"]}
    return {
        "query_pre_attn_scalar": _scores(config, 62),
        "rope_parameters": {FULL: full, SLIDING: local},
        "rope_scaling": None,
    }


FAMILIES.register(
    "gemma3_text",
    Family(
        model_type="gemma3_text",
        architecture="Gemma3ForCausalLM",
        gguf_architecture="gemma3",
        weights=_with_all_norms(HEAD_NORMS),
        scales=Scales(embedding=_scale, softcap="final_logit_softcapping"),
        left_out=(*_LEFT_OUT, *_OF_WINDOWS, "rope_parameters"),
        gguf_rules=GgufRules(
            activation=Activation("hidden_activation", _GELU),
            window=Window(6),
            stated=(Stated("final_logit_softcapping", "final_logit_softcapping", 0.0, optional=True),),
            further=Further(_thetas, _read_ropes),
            rope=lambda config: {**config, "rope_parameters": _rope_of(config, FULL)},
            refuses=lambda config: _refuses(62, config),
        ),
    ),
)
