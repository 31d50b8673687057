"""ERNIE 4.5: dense (0.3B), a Llama that turns neighbouring pairs; with experts (21B-A3B, 300B-A47B), which a bias chooses and
does not weigh."""

from dataclasses import replace

from camera.models.experts import Config, Experts, Shared, whole
from camera.models.family import FAMILIES, Family
from camera.models.gguf import STEP, GgufRules, Stated
from camera.models.weight import Weight
from camera.models.weights import (
    FFN_NORM,
    attention_weights,
    decoder,
    decoder_weights,
    dense_weights,
    expert_weights,
)

_WIDTH = "moe_intermediate_size"


def is_sparse(config: Config, layer: int) -> bool:
    """Every `moe_layer_interval`-th layer from the start index to the end index, which -1 says is the last."""
    last = config.get("moe_layer_end_index", -1)
    interval = max(1, whole(config, "moe_layer_interval", 1))
    return (
        (layer + 1) % interval == 0
        and layer >= whole(config, "moe_layer_start_index", 1)
        and (last in (None, -1) or layer <= whole(config, "moe_layer_end_index"))
    )


def _refuses(config: Config) -> str | None:
    return "use_bias: feed-forward layers with biases are not supported" if config.get("use_bias") else None


def _in_one_row(weight: Weight) -> Weight:
    """Checkpoints hold the bias as a matrix of one row."""
    return replace(weight, shape=("1", "experts")) if weight.role == "correction" else weight


FAMILIES.register(
    "ernie4_5",
    Family(
        model_type="ernie4_5",
        architecture="Ernie4_5ForCausalLM",
        gguf_architecture="ernie4_5",
        weights=decoder_weights({}),
        left_out=("head_dim", "rope_parameters", "tie_word_embeddings"),
        refuses=_refuses,
    ),
)

FAMILIES.register(
    "ernie4_5_moe",
    Family(
        model_type="ernie4_5_moe",
        architecture="Ernie4_5_MoeForCausalLM",
        gguf_architecture="ernie4_5-moe",
        weights=decoder(
            *attention_weights({}),
            FFN_NORM,
            *dense_weights(layers="dense"),
            *map(
                _in_one_row,
                expert_weights(
                    _WIDTH, shared="shared_experts", correction="moe_statics.e_score_correction_bias"
                ),
            ),
        ),
        experts=Experts(
            count_keys=("moe_num_experts", "num_experts"),
            chosen_keys=("moe_k", "num_experts_per_tok"),
            width_key=_WIDTH,
            is_sparse=is_sparse,
            shared=Shared("shared_experts", _WIDTH, ("moe_num_shared_experts",)),
        ),
        gguf_rules=GgufRules(
            stated=(Stated(STEP, "moe_layer_interval", 1),),
            config={"moe_layer_end_index": -1},
            lead=("moe_layer_start_index", 1),
        ),
        left_out=("rope_parameters", "tie_word_embeddings"),
        ignored=("*.rotary_emb.inv_freq", "model.mtp_*"),
        refuses=_refuses,
    ),
)
