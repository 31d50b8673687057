"""openPangu-Embedded (1B, 7B, 7B-V1.1): a Llama with biases on q, k, v and o."""

from camera.models.family import Family


def _register() -> None:
    # Here and not at the top: it imports transformers, which listing the families does not need.
    from camera.models.pangu_embedded import register

    register()


FAMILY = Family(
    model_type="PanguEmbedded",
    architecture="PanguEmbeddedForCausalLM",
    gguf_architecture="pangu-embedded",
    attention_bias=lambda config: ("q", "k", "v", "o") if config.get("bias", True) else (),
    register=_register,
)
