"""InternLM3 (8B): a Llama with heads of a width of its own, which transformers builds as one.

A GGUF file has it as a Llama, and is read back as one. transformers has no class of InternLM and InternLM2.
"""

from camera.models.experts import Config
from camera.models.family import FAMILIES, Family
from camera.models.gguf import GgufRules
from camera.models.weights import decoder_weights


def _refuses(config: Config) -> str | None:
    found = [key for key in ("qkv_bias", "bias", "attention_bias", "mlp_bias") if config.get(key)]
    return f"{found[0]}: biases are not supported in this family" if found else None


FAMILIES.register(
    "internlm3",
    Family(
        model_type="internlm3",
        architecture="InternLM3ForCausalLM",
        gguf_architecture="llama",
        weights=decoder_weights({}),
        permutes_rotary=True,
        left_out=("head_dim",),
        gguf_rules=GgufRules(reads_back=False),
        refuses=_refuses,
    ),
)
