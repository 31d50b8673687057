"""openPangu-Embedded (1B, 7B, 7B-V1.1): a Llama with biases on query, key, value and output."""

from camera.models.family import ATTENTION, FAMILIES, Family, When
from camera.models.weights import decoder_weights


def _register() -> None:
    # Here and not at the top: it imports transformers, which listing the families does not need.
    from camera.models.pangu.modeling import register

    register()


FAMILIES.register(
    "PanguEmbedded",
    Family(
        model_type="PanguEmbedded",
        architecture="PanguEmbeddedForCausalLM",
        gguf_architecture="pangu-embedded",
        weights=decoder_weights(dict.fromkeys(ATTENTION, When("bias", default=True))),
        register=_register,
    ),
)
