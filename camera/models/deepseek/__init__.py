"""DeepSeek: a shared expert as wide as some routed ones, the first layers dense; from V2 on latent attention.

V1 (DeepSeek-MoE-16B) has no class in transformers and gets one here.
"""

from collections.abc import Callable
from functools import partial

from camera.models.experts import Config, Experts, Shared, enough_to_choose, whole
from camera.models.family import FAMILIES, Family, Size
from camera.models.gguf import SIGMOID, SOFTMAX, Fixed, GgufRules, Part, Stated, normalised
from camera.models.weight import ATTENTION, Weight, When
from camera.models.weights import (
    ATTENTION_NORM,
    FFN_NORM,
    GGUF,
    attention_weights,
    decoder,
    dense_weights,
    expert_weights,
    linear,
    norm,
    only,
)

_WIDTH = "moe_intermediate_size"
_HEADS = "num_attention_heads"
_LATENT, _DIRECT = When("q_lora_rank", default=True), When("q_lora_rank", default=True, expected=False)


_KEY_VALUE_B = (
    Part(f"{GGUF}attn_k_b.weight", "qk_nope_head_dim", transposed=True),
    Part(f"{GGUF}attn_v_b.weight", "v_head_dim"),
)


def latent_attention_weights() -> tuple[Weight, ...]:
    """Multi-head latent attention: keys and values from one latent vector of a token, queries from another if
    `q_lora_rank` is there (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    Of each head's rows of the last matrix, a GGUF file holds those of the key transposed.
    """
    stream, latent, queries = "normed stream", "normed latent", "normed latent of the query"
    query = ("mla_query_size", "hidden_size")
    key_value_a, key_value_b = ("mla_latent_size", "hidden_size"), ("mla_key_value_size", "kv_lora_rank")
    query_b = (
        norm("query_a_norm", "self_attn.q_a_layernorm", "attn_q_a_norm", "q_lora_rank"),
        *linear("query_b", "self_attn.q_b_proj", "attn_q_b", ("mla_query_size", "q_lora_rank"), queries),
    )
    query_a = linear("query_a", "self_attn.q_a_proj", "attn_q_a", ("q_lora_rank", "hidden_size"), stream)
    return (
        ATTENTION_NORM,
        *only(linear("query", "self_attn.q_proj", "attn_q", query, stream), when=_DIRECT),
        *only(query_a, when=_LATENT),
        *linear("key_value_a", "self_attn.kv_a_proj_with_mqa", "attn_kv_a_mqa", key_value_a, stream),
        *only(query_b, when=_LATENT),
        norm("key_value_a_norm", "self_attn.kv_a_layernorm", "attn_kv_a_norm", "kv_lora_rank"),
        *only(
            linear("key_value_b", "self_attn.kv_b_proj", "attn_kv_b", key_value_b, latent), parts=_KEY_VALUE_B
        ),
        *linear("output", "self_attn.o_proj", "attn_output", ("hidden_size", "mla_value_size"), "heads"),
    )


def _of_heads(*keys: str) -> Size:
    """All heads together, each the sum of some keys."""
    return lambda config: whole(config, _HEADS) * sum(whole(config, key) for key in keys)


_SIZES: dict[str, Size] = {
    "mla_query_size": _of_heads("qk_nope_head_dim", "qk_rope_head_dim"),
    "mla_latent_size": lambda config: whole(config, "kv_lora_rank") + whole(config, "qk_rope_head_dim"),
    "mla_key_value_size": _of_heads("qk_nope_head_dim", "v_head_dim"),
    "mla_value_size": _of_heads("v_head_dim"),
}


def _sparse_after(first: int) -> Callable[[Config, int], bool]:
    """Layers from `first_k_dense_replace` on; `first` is what configs without it mean."""
    return lambda config, layer: layer >= whole(config, "first_k_dense_replace", first)


def _groups(config: Config) -> int:
    """V2 knows groups only where it is told to choose by them."""
    return whole(config, "n_group", 1) if config.get("topk_method") == "group_limited_greedy" else 1


def _other_scores(config: Config, scores: str) -> str | None:
    given = config.get("scoring_func") or scores
    return (
        None if given == scores else f"scoring_func is {given!r}, and this family scores experts by {scores}"
    )


def _refuses(config: Config, scores: str) -> str | None:
    if config.get("moe_layer_freq", 1) != 1:
        return "moe_layer_freq is not 1: transformers builds no such model"
    if config.get("mlp_bias") or config.get("attention_bias"):
        return "mlp_bias and attention_bias: no published model has them, and they are not supported"
    return _other_scores(config, scores)


def _refuses_v2(config: Config) -> str | None:
    if config.get("norm_topk_prob"):
        return (
            "norm_topk_prob: transformers leaves the weights of the chosen experts as they are in this family"
        )
    return _refuses(config, "softmax")


def _v2_differences(config: Config) -> list[str]:
    if _groups(config) == 1:
        return []
    return [
        "llama.cpp ranks a group of experts by its two best, and DeepSeek-V2 by its best: some tokens get other experts, "
        "and the logits differ"
    ]


def _register() -> None:
    # Here and not at the top: it imports transformers, which listing the families does not need.
    from camera.models.deepseek.modeling import register

    register()


def _is_sparse(config: Config, layer: int) -> bool:
    """Of V1, every `moe_layer_freq`-th of the layers that are not dense."""
    return _sparse_after(0)(config, layer) and layer % max(1, whole(config, "moe_layer_freq", 1)) == 0


def _refuses_v1(config: Config) -> str | None:
    if config.get("mlp_bias"):
        return "mlp_bias: feed-forward layers with biases are not supported"
    return _other_scores(config, "softmax")


FAMILIES.register(
    "deepseek",
    Family(
        model_type="deepseek",
        architecture="DeepseekForCausalLM",
        gguf_architecture="deepseek",
        weights=decoder(
            *attention_weights(dict.fromkeys(ATTENTION, When("attention_bias", default=False))),
            FFN_NORM,
            *dense_weights(layers="dense"),
            *expert_weights(_WIDTH, shared="shared_experts"),
        ),
        experts=Experts(
            count_keys=("n_routed_experts",),
            chosen_keys=("num_experts_per_tok",),
            width_key=_WIDTH,
            is_sparse=_is_sparse,
            shared=Shared("shared_experts", _WIDTH, ("n_shared_experts",)),
        ),
        gguf_rules=GgufRules(
            constants={"expert_weights_scale": 1.0},
            fixed=(
                normalised(graph=False, default=False),
                Fixed(
                    "moe_layer_freq",
                    value=1,
                    default=1,
                    otherwise="llama.cpp knows experts in every layer after the first dense ones alone (moe_layer_freq): it "
                    "will not load this model",
                ),
            ),
            lead=("first_k_dense_replace", 0),
        ),
        permutes_rotary=True,
        refuses=_refuses_v1,
        register=_register,
    ),
)

FAMILIES.register(
    "deepseek_v2",
    Family(
        model_type="deepseek_v2",
        architecture="DeepseekV2ForCausalLM",
        gguf_architecture="deepseek2",
        weights=decoder(
            *latent_attention_weights(),
            FFN_NORM,
            *dense_weights(layers="dense"),
            *expert_weights(_WIDTH, shared="shared_experts"),
        ),
        sizes=_SIZES,
        experts=Experts(
            count_keys=("n_routed_experts",),
            chosen_keys=("num_experts_per_tok",),
            width_key=_WIDTH,
            is_sparse=_sparse_after(0),
            shared=Shared("shared_experts", _WIDTH, ("n_shared_experts",)),
            groups=_groups,
            least_per_group=lambda config: enough_to_choose(config) if _groups(config) > 1 else 1,
        ),
        gguf_rules=GgufRules(
            stated=(Stated("expert_weights_scale", "routed_scaling_factor", 1.0),),
            constants={"expert_gating_func": SOFTMAX, "expert_weights_norm": False},
            config={"topk_method": "group_limited_greedy"},
            latent=True,
            lead=("first_k_dense_replace", 0),
            groups=("n_group", "topk_group", 1),
            differences=_v2_differences,
        ),
        refuses=_refuses_v2,
    ),
)

FAMILIES.register(
    "deepseek_v3",
    Family(
        model_type="deepseek_v3",
        architecture="DeepseekV3ForCausalLM",
        gguf_architecture="deepseek2",
        weights=decoder(
            *latent_attention_weights(),
            FFN_NORM,
            *dense_weights(layers="dense"),
            *expert_weights(_WIDTH, shared="shared_experts", correction="gate.e_score_correction_bias"),
        ),
        sizes=_SIZES,
        experts=Experts(
            count_keys=("n_routed_experts", "num_local_experts"),
            chosen_keys=("num_experts_per_tok",),
            width_key=_WIDTH,
            is_sparse=_sparse_after(3),
            shared=Shared("shared_experts", _WIDTH, ("n_shared_experts",)),
            groups=lambda config: whole(config, "n_group", 8),
            least_per_group=partial(enough_to_choose, scored=2),
        ),
        gguf_rules=GgufRules(
            stated=(
                Stated("expert_weights_scale", "routed_scaling_factor", 2.5),
                Stated("expert_weights_norm", "norm_topk_prob", default=True),
            ),
            constants={"expert_gating_func": SIGMOID},
            fixed=(
                Fixed(
                    "rope_interleave",
                    value=True,
                    default=True,
                    otherwise="llama.cpp turns pairs of neighbours by their position, and config.json says halves "
                    "(rope_interleave): its logits will differ",
                ),
            ),
            config={"num_nextn_predict_layers": 0},
            latent=True,
            lead=("first_k_dense_replace", 3),
            groups=("n_group", "topk_group", 4),
        ),
        prediction_layers_key="num_nextn_predict_layers",
        refuses=partial(_refuses, scores="sigmoid"),
    ),
)
