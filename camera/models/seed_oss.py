"""Seed-OSS (36B): a Llama with biases on query, key and value."""

from camera.models.family import FAMILIES, Family
from camera.models.weight import When
from camera.models.weights import attention_weights, decoder, dense_weights, norm

_BIASES = {
    **dict.fromkeys(("query", "key", "value"), When("attention_bias", default=True)),
    "output": When("attention_out_bias", default=False),
}

FAMILIES.register(
    "seed_oss",
    Family(
        model_type="seed_oss",
        architecture="SeedOssForCausalLM",
        gguf_architecture="seed_oss",
        weights=decoder(
            *attention_weights(_BIASES),
            norm("ffn_norm", "post_attention_layernorm", "post_attention_norm"),
            *dense_weights(),
        ),
        left_out=("head_dim",),
    ),
)
