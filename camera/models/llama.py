"""Llama, and what is built exactly like it."""

from camera.models.family import Family

FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    gguf_architecture="llama",
    permutes_rotary=True,
    attention_bias=lambda config: ("q", "k", "v", "o") if config.get("attention_bias", False) else (),
)
