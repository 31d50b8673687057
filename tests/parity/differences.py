"""Keys in which our files and those of llama.cpp's converter differ, and why. A difference that is not here is a fault."""

from fnmatch import fnmatch
from typing import Any

OURS, THEIRS = "only in ours", "only in theirs"

_KEYS: dict[str, str] = {
    "camera.*": "our own, which llama.cpp passes over",
    "general.name": "given by the caller; theirs is made of the folder's",
    "general.basename": "theirs is read out of the folder's name",
    "general.size_label": "the same number, written by the caller of ours from the packed folder",
    "*.attention.key_length": "ours states a head's width always; theirs where config.json has head_dim",
    "*.attention.value_length": "as key_length",
    "*.rope.dimension_count": "ours states it always; llama.cpp's default is the head's width",
    "*.rope.freq_base": "ours states it always; llama.cpp's default is 10000",
    "*.rope.scaling.type": "theirs writes that there is none in some families",
    "*.vocab_size": "ours states it always; llama.cpp counts the tokens",
    "*.expert_feed_forward_length": "ours states it always; llama.cpp takes the dense width without it",
    "*.expert_shared_feed_forward_length": "ours states it always, of all shared experts together; theirs seldom, of one",
    "*.expert_group_count": "one group restricts nothing: ours leaves it out",
    "*.expert_group_used_count": "as expert_group_count",
    "*.expert_gating_func": "ours states it always; llama.cpp knows it by the architecture without",
    "*.expert_weights_norm": "ours states what config.json says; llama.cpp's default is false",
    "deepseek2.attention.q_lora_rank": "ours writes 0 for none, which newer llama.cpp asks for",
    "gemma3.attention.sliding_window_pattern": "ours states the layers; theirs leaves the published pattern to llama.cpp",
    "phi*.attention.sliding_window": "theirs writes 0 for none",
    "*.nextn_predict_layers": "ours holds no layers that predict further tokens",
    "phi3.rope.scaling.original_context_length": "theirs writes it without a scaling",
    "tokenizer.ggml.add_eos_token": "ours is written always; llama.cpp's default for these is false",
    "tokenizer.ggml.unknown_token_id": "ours is found in sentencepiece folders too, where theirs looks in tokenizer.json alone",
    "tokenizer.ggml.add_space_prefix": "ours says what the sentencepiece model does, and nothing for bytes, where nobody reads it; "
    "theirs says false in Gemma's families, whose published models have none",
    "gemma.*eot_token_id": "a number of the published vocabulary, in theirs whatever the vocabulary is",
    "tokenizer.ggml.eot_token_id": "theirs writes numbers and names of published vocabularies (Gemma, GLM)",
    "tokenizer.ggml.eom_token_id": "as eot_token_id",
}
_OF_FAMILY: dict[tuple[str, str], str] = {
    (
        "hunyuan_v1_moe",
        "hunyuan-moe.expert_shared_count",
    ): "llama.cpp takes the shared width alone in this family",
    (
        "hunyuan_v1_dense",
        "tokenizer.ggml.eos_token_id",
    ): "theirs writes the number of the published vocabulary",
    ("glm4", "tokenizer.ggml.*_token_id"): "theirs writes tokens of the published vocabulary by name",
    (
        "phimoe",
        "phimoe.rope.scaling.attn_factor",
    ): "ours is config.json's short_mscale, as in transformers; theirs Phi-3's formula",
    ("glm4_moe", "tokenizer.ggml.*_token_id"): "as glm4",
}
TENSORS: dict[tuple[str, str], str] = {
    (
        "deepseek_v2",
        "*.attn_[kv]_b.weight",
    ): "parts of one matrix, of which one is transposed, as blocks of a row cannot be: both kept in 16 bits, where theirs rounds them",
    ("deepseek_v3", "*.attn_[kv]_b.weight"): "as deepseek_v2",
    ("ernie4_5_moe", "*.exp_probs_b.bias"): "the same numbers, [1, experts] in theirs",
    (
        "qwen2_moe",
        "*.ffn_gate_inp_shexp.weight",
    ): "the same numbers, [1, hidden] in ours and [hidden] in theirs",
}
"""Tensors that differ, by family and name."""


def unexplained(family: str, ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys that differ without a reason, with both values."""
    differ = {
        key: (ours.get(key, THEIRS), theirs.get(key, OURS))
        for key in ours.keys() | theirs.keys()
        if ours.get(key, THEIRS) != theirs.get(key, OURS)
    }
    return {
        key: values
        for key, values in sorted(differ.items())
        if not any(fnmatch(key, pattern) for pattern in _KEYS)
        and not any(family == of and fnmatch(key, pattern) for of, pattern in _OF_FAMILY)
    }
