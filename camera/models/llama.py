"""Llama, and what is built exactly like it."""

from camera.models.block import FEED_FORWARD
from camera.models.family import FAMILIES, Family
from camera.models.weight import ATTENTION, When
from camera.models.weights import decoder_weights

_BIASES = {
    **dict.fromkeys(ATTENTION, When("attention_bias", default=False)),
    **dict.fromkeys(FEED_FORWARD, When("mlp_bias", default=False)),
}

FAMILIES.register(
    "llama",
    Family(
        model_type="llama",
        architecture="LlamaForCausalLM",
        gguf_architecture="llama",
        weights=decoder_weights(_BIASES),
        permutes_rotary=True,
    ),
)
