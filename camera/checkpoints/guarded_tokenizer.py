"""A tokenizer at work on texts in a child process: what a pattern, a normaliser or a chat template costs is bounded.

A text is one call into a native library, which no signal of this process can end. Ids are those of the whole text in
one call: pieces would be others where a rule looks across their border.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from camera.guarded import Guarded, Limits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTES_PER_BYTE = 600
"""Memory for a byte of text; tokenizers took 90 (sentencepiece) to 480 (byte-level BPE, a token for each sign)."""
_SECONDS_PER_BYTE = 1e-5
"""Computing for a byte of text; they took 0.8 to 1.9 microseconds on a core of 2.5 GHz."""
_TRIED = 1 << 18
"""Characters of a long text that are tried first: what costs too much shows there, in the time of a short text."""


class GuardedTokenizer:
    """The work of a tokenizer on texts, done in a child of this process that lives until `close`.

    Every method raises CameraError if the library panics or dies, or it takes more memory or time than texts do.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Args:
        tokenizer: as `load_tokenizer` gives it.
        """
        place = getattr(tokenizer, "name_or_path", "")
        self._tokenizer = tokenizer
        self._guarded = Guarded(
            self._work, f"the tokenizer of {place}" if place else "the tokenizer", _limits
        )

    def __enter__(self) -> "GuardedTokenizer":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child; more work begins another."""
        self._guarded.close()

    def ids(self, text: str) -> torch.Tensor:
        """The tokens of a text, with what the tokenizer puts before and after it, int64 [tokens]."""
        if len(text) > 4 * _TRIED:
            self._guarded("ids", text[:_TRIED])
        return torch.from_numpy(self._guarded("ids", text))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a short text."""
        return list(self._guarded("encode", text, add_special_tokens=add_special_tokens, verbose=False))

    def decode(self, ids: Sequence[int], **how: bool) -> str:
        """The text of tokens; `how` as transformers has it."""
        return str(self._guarded("decode", ids, **how))

    def chat(self, messages: list[dict[str, str]]) -> str:
        """The messages as the chat template writes them, up to where the answer begins."""
        how = {"tokenize": False, "add_generation_prompt": True}
        return str(self._guarded("apply_chat_template", messages, **how))

    def _work(self, method: str, given: Any, **how: Any) -> Any:
        """What the child does."""
        if method != "ids":
            return getattr(self._tokenizer, method)(given, **how)
        found = self._tokenizer(
            given, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )
        return np.array(found["input_ids"], dtype=np.int64)


def _limits(method: str, given: Any, **how: Any) -> Limits:
    size = len(given.encode(errors="surrogatepass")) if isinstance(given, str) else 8 * len(given)
    usual = Limits()
    return Limits(usual.memory_bytes + _BYTES_PER_BYTE * size, usual.seconds + _SECONDS_PER_BYTE * size)
