"""openPangu-Embedded for transformers, natively: a Llama with biases on the four attention projections.

The code that the published checkpoints carry needs an NPU and an old transformers. These classes read the same
folders (config.json with `bias`, tokenizer.model, extra rotary buffers) with no code from the checkpoint.
"""

import os
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
)
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from camera.files import read_json, write_json

_LLAMA_ONLY_KEYS = ("attention_bias", "mlp_bias", "pretraining_tp")
_UNUSED_TENSORS = [r"rotary_emb\.inv_freq$"]
_PATTERNS = {(True, False): "bos", (True, True): "bos_eos", (False, True): "eos", (False, False): "none"}
"""transformers' name for which special tokens surround a text, by (add_bos_token, add_eos_token)."""


class PanguEmbeddedConfig(LlamaConfig):
    """config.json of openPangu-Embedded: `bias` (default true) stands for Llama's `attention_bias`."""

    model_type = "PanguEmbedded"

    bias: bool = True
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 45892
    pad_token_id: int | None = 0

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("auto_map", None)  # would point a saved copy at remote code that nobody needs
        self.attention_bias = self.bias
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    def to_dict(self) -> dict[str, Any]:
        """The keys of the published config.json: `bias` and `rope_theta`, none that only Llama has."""
        keys = super().to_dict()
        for name in _LLAMA_ONLY_KEYS:
            keys.pop(name, None)
        if keys.get("head_dim") == self.hidden_size // self.num_attention_heads:
            del keys["head_dim"]
        rope = keys.get("rope_parameters") or {}
        if rope.get("rope_type", "default") == "default" and "rope_theta" in rope:
            del keys["rope_parameters"]
            keys["rope_theta"] = rope["rope_theta"]
        return keys


class PanguEmbeddedModel(LlamaModel):
    """The decoder without a language-model head."""

    config_class = PanguEmbeddedConfig
    _keys_to_ignore_on_load_unexpected = [*_UNUSED_TENSORS, r"^lm_head\."]  # noqa: RUF012


class PanguEmbeddedForCausalLM(LlamaForCausalLM):
    """The decoder with its language-model head; logits are bit-equal to Llama's with `attention_bias=True`."""

    config_class = PanguEmbeddedConfig
    _keys_to_ignore_on_load_unexpected = _UNUSED_TENSORS


class PanguTokenizer(SentencePieceBackend):
    """openPangu's tokenizer: sentencepiece on each stretch of text between special tokens, `<s>` before it all.

    Text without special tokens gives exactly the ids of sentencepiece. After a special token a stretch begins
    like a text of its own, with sentencepiece's leading space, as llama.cpp and the published code have it.
    """

    padding_side = "left"
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(
        self,
        vocab_file: str | None = None,
        add_bos_token: bool = True,
        add_eos_token: bool = False,
        **kwargs: Any,
    ) -> None:
        """Args:
        vocab_file: the sentencepiece `tokenizer.model`.
        add_bos_token: begin every text with `bos_token`.
        add_eos_token: end every text with `eos_token`.
        kwargs: the other keys of tokenizer_config.json.

        Raises:
            ValueError: without a vocab_file.
        """
        if vocab_file is None:
            raise ValueError("tokenizer.model is missing: fetch the checkpoint's tokenizer files again")
        kwargs.pop("auto_map", None)  # as in the config: a saved copy needs no remote code
        kwargs["legacy"] = True  # the base's other mode drops the leading space; openPangu has one mode only
        kwargs["special_tokens_pattern"] = _PATTERNS[add_bos_token, add_eos_token]
        super().__init__(  # type: ignore[no-untyped-call]
            vocab_file=vocab_file, add_bos_token=add_bos_token, add_eos_token=add_eos_token, **kwargs
        )
        self.add_bos_token, self.add_eos_token = add_bos_token, add_eos_token

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of pieces, byte pieces joined to characters; special tokens stand as they are written."""
        parts: list[str] = []
        for special, run in groupby(tokens, key=self._added_tokens_encoder.__contains__):
            pieces = list(run)
            parts.append("".join(pieces) if special else self.sp_model.decode(pieces))
        return "".join(parts)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Save as transformers does, and keep `add_bos_token` and `add_eos_token`, which it drops."""
        files = super().save_pretrained(save_directory, *args, **kwargs)
        path = Path(save_directory) / "tokenizer_config.json"
        saved = {"add_bos_token": self.add_bos_token, "add_eos_token": self.add_eos_token}
        write_json(path, saved | read_json(path))
        return files


@cache
def register() -> None:
    """Make transformers' Auto classes know openPangu-Embedded. Calling it again does nothing."""
    AutoConfig.register(PanguEmbeddedConfig.model_type, PanguEmbeddedConfig, exist_ok=True)
    AutoModel.register(PanguEmbeddedConfig, PanguEmbeddedModel, exist_ok=True)
    AutoModelForCausalLM.register(PanguEmbeddedConfig, PanguEmbeddedForCausalLM, exist_ok=True)
    AutoTokenizer.register(PanguEmbeddedConfig, slow_tokenizer_class=PanguTokenizer, exist_ok=True)
