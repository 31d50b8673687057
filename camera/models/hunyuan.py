"""Hunyuan: a Llama with norms on query and key after the rotation, dense (0.5B to 7B), or with experts and a shared one as
wide as they are in every layer (A13B).

Published configs of the latter give numbers of experts and widths as lists with one for every layer; all of them must be alike.
"""

from camera.models.experts import Config, Experts, Shared
from camera.models.family import FAMILIES, Family
from camera.models.weight import ATTENTION, When
from camera.models.weights import FFN_NORM, attention_weights, decoder, decoder_weights, expert_weights, norm

_WIDTH = "intermediate_size"


def _refuses(config: Config) -> str | None:
    lists = {key: value for key, value in config.items() if isinstance(value, list) and key in _PER_LAYER}
    for key, values in lists.items():
        if any(value != values[0] for value in values):
            return f"{key} differs from layer to layer, and transformers builds all layers alike"
    width = lists.get("moe_intermediate_size", [config.get("moe_intermediate_size")])[0]
    if width not in (None, config.get(_WIDTH)):
        return f"moe_intermediate_size is {width}, and transformers gives every expert {config.get(_WIDTH)} channels"
    if (shared := lists.get("num_shared_expert", [config.get("num_shared_expert", 1)])[0]) != 1:
        return f"num_shared_expert is {shared}, and transformers builds one"
    return None


_PER_LAYER = ("num_experts", "moe_topk", "moe_intermediate_size", "num_shared_expert")

_NORMS = (
    norm("query_norm", "self_attn.query_layernorm", "attn_q_norm", "head_dim"),
    norm("key_norm", "self_attn.key_layernorm", "attn_k_norm", "head_dim"),
)

FAMILIES.register(
    "hunyuan_v1_dense",
    Family(
        model_type="hunyuan_v1_dense",
        architecture="HunYuanDenseV1ForCausalLM",
        gguf_architecture="hunyuan-dense",
        weights=decoder_weights(
            dict.fromkeys(ATTENTION, When("attention_bias", default=False)), norms=_NORMS
        ),
    ),
)

FAMILIES.register(
    "hunyuan_v1_moe",
    Family(
        model_type="hunyuan_v1_moe",
        architecture="HunYuanMoEV1ForCausalLM",
        gguf_architecture="hunyuan-moe",
        weights=decoder(
            *attention_weights(
                dict.fromkeys(ATTENTION, When("attention_bias", default=False)),
                norms=_NORMS,
            ),
            FFN_NORM,
            *expert_weights(_WIDTH, router="gate.wg", shared="shared_mlp"),
        ),
        experts=Experts(
            count_keys=("num_experts", "num_local_experts"),
            chosen_keys=("moe_topk", "num_experts_per_tok"),
            width_key=_WIDTH,
            width_repeats=("moe_intermediate_size",),
            shared=Shared("shared_mlp", _WIDTH),
        ),
        refuses=_refuses,
    ),
)
