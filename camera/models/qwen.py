"""Qwen2 (biases on q, k, v) and Qwen3 dense (norms on q and k)."""

from camera.models.family import Family

QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    gguf_architecture="qwen2",
    attention_bias=lambda config: ("q", "k", "v"),
)

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    gguf_architecture="qwen3",
    attention_bias=lambda config: ("q", "k", "v", "o") if config.get("attention_bias", False) else (),
)
