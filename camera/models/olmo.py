"""OLMo 2 (1B to 32B): norms behind attention and feed-forward part and none before; query and key are normed over all heads."""

from camera.models.family import FAMILIES, Family
from camera.models.weight import ATTENTION, When
from camera.models.weights import NORMS_OF_ALL_HEADS, attention_weights, decoder, dense_weights, post_norms

FAMILIES.register(
    "olmo2",
    Family(
        model_type="olmo2",
        architecture="Olmo2ForCausalLM",
        gguf_architecture="olmo2",
        weights=decoder(
            *attention_weights(
                dict.fromkeys(ATTENTION, When("attention_bias", default=False)),
                norms=NORMS_OF_ALL_HEADS,
                before=(),
            ),
            *post_norms(),
            *dense_weights(),
        ),
    ),
)
