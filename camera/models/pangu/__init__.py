"""openPangu: Embedded (1B, 7B, 7B-V1.1), a Llama with biases on query, key, value and output, and Pro-MoE (72B), which has
such attention and experts in groups."""

from pathlib import Path

from camera.models.experts import Config, Experts, Shared, layers_of, whole
from camera.models.family import FAMILIES, Family
from camera.models.weight import ATTENTION, LAYER, Weight, When
from camera.models.weights import (
    FFN_NORM,
    attention_weights,
    decoder,
    decoder_weights,
    dense_weights,
    expert_weights,
)

_BIASES = dict.fromkeys(ATTENTION, When("bias", default=True))
_WIDTH = "moe_intermediate_size"


def _register() -> None:
    # Here and not at the top: it imports transformers, which listing the families does not need.
    from camera.models.pangu.modeling import register

    register()


def _register_moe() -> None:
    from camera.models.pangu.moe_modeling import register  # as above

    register()


def _is_sparse(config: Config, layer: int) -> bool:
    return layer not in layers_of(config, "mlp_only_layers")


FAMILIES.register(
    "PanguEmbedded",
    Family(
        model_type="PanguEmbedded",
        architecture="PanguEmbeddedForCausalLM",
        gguf_architecture="pangu-embedded",
        weights=decoder_weights(_BIASES),
        register=_register,
        config_code=Path(__file__).with_name("configuration_openpangu_dense.py"),
    ),
)

FAMILIES.register(
    "PanguProMoE",
    Family(
        model_type="PanguProMoE",
        architecture="PanguProMoEForCausalLM",
        gguf_architecture=None,
        weights=decoder(
            *attention_weights(_BIASES),
            FFN_NORM,
            *dense_weights(layers="dense"),
            *expert_weights(_WIDTH, shared="shared_expert"),
            Weight(
                f"{LAYER}mlp.router_scale", "router_scale", ("1", "experts"), "", layers="sparse", exact=True
            ),
        ),
        experts=Experts(
            count_keys=("num_experts",),
            chosen_keys=("num_experts_per_tok",),
            width_key=_WIDTH,
            is_sparse=_is_sparse,
            shared=Shared("shared_expert", "shared_expert_intermediate_size"),
            groups=lambda config: whole(config, "num_experts_per_tok"),
        ),
        register=_register_moe,
    ),
)
