"""Qwen2 (biases on query, key, value) and Qwen3 dense (norms on query and key)."""

from camera.models.family import FAMILIES, Family
from camera.models.weight import ATTENTION, When
from camera.models.weights import HEAD_NORMS, decoder_weights

FAMILIES.register(
    "qwen2",
    Family(
        model_type="qwen2",
        architecture="Qwen2ForCausalLM",
        gguf_architecture="qwen2",
        weights=decoder_weights(dict.fromkeys(("query", "key", "value"))),
    ),
)

FAMILIES.register(
    "qwen3",
    Family(
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        gguf_architecture="qwen3",
        weights=decoder_weights(
            dict.fromkeys(ATTENTION, When("attention_bias", default=False)), norms=HEAD_NORMS
        ),
        left_out=("head_dim",),
    ),
)
