"""Mistral (7B v0.1 to v0.3, Nemo 12B, Small): a Llama, whose layers may all see a sliding window.

A GGUF file has it as a Llama, and is read back as one.
"""

from camera.models.family import FAMILIES, Family
from camera.models.gguf import GgufRules
from camera.models.weights import decoder_weights

FAMILIES.register(
    "mistral",
    Family(
        model_type="mistral",
        architecture="MistralForCausalLM",
        gguf_architecture="llama",
        weights=decoder_weights({}),
        permutes_rotary=True,
        left_out=("sliding_window",),
        gguf_rules=GgufRules(reads_back=False),
    ),
)
