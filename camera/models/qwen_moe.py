"""Qwen3 with mixture-of-experts layers (30B-A3B, 235B-A22B)."""

from camera.models.family import (
    ATTENTION,
    FAMILIES,
    Config,
    Experts,
    Family,
    When,
    attention_weights,
    decoder,
    dense_weights,
    expert_weights,
)


def is_sparse(config: Config, layer: int) -> bool:
    """Every `decoder_sparse_step`-th layer that `mlp_only_layers` does not name."""
    step = int(config.get("decoder_sparse_step") or 1)
    return layer not in (config.get("mlp_only_layers") or ()) and (layer + 1) % step == 0


FAMILIES.register(
    "qwen3_moe",
    Family(
        model_type="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        gguf_architecture="qwen3moe",
        weights=decoder(
            *attention_weights(
                dict.fromkeys(ATTENTION, When("attention_bias", default=False)), head_norms=True
            ),
            *dense_weights(layers="dense"),
            *expert_weights("moe_intermediate_size"),
        ),
        experts=Experts(
            count_keys=("num_experts", "num_local_experts"),
            chosen_keys=("num_experts_per_tok",),
            width_key="moe_intermediate_size",
            is_sparse=is_sparse,
        ),
    ),
)
