"""A vocabulary as llama.cpp reads it: texts, scores and types by token id, and how text becomes tokens."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType

from camera.errors import CameraError

WORD_START = "\u2581"
"""What sentencepiece writes for a space."""
_ADDED_SCORE = -1000.0
_PADDING_SCORE = -10000.0
_STEERING = {"<pad>", "<mask>", "<2mass>", "[@BOS@]"}
_STEERING_MARKS = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
"""Added tokens that publishers forgot to call special, as llama.cpp's converter recognises them."""


@dataclass
class Vocabulary:
    """Ids that the tokenizer leaves out are unused padding."""

    model: str
    """llama.cpp's name of how text becomes tokens: `gpt2` by merges of bytes, `llama` by scores, `t5` by probability."""
    pre: str
    """Its name of the rule that splits text before; `default` where there is none."""
    texts: list[str]
    scores: list[float]
    types: list[TokenType]
    merges: list[str] = field(default_factory=list)
    further: dict[str, bool | bytes] = field(default_factory=dict)
    """Keys below `tokenizer.ggml`: `add_space_prefix`, `remove_extra_whitespaces`, `precompiled_charsmap`."""

    @classmethod
    def of_padding(cls, model: str, pre: str, rows: int) -> "Vocabulary":
        return cls(
            model,
            pre,
            [f"[PAD{number}]" for number in range(rows)],
            [_PADDING_SCORE] * rows,
            [TokenType.UNUSED] * rows,
        )

    def set(self, number: int, text: str, score: float, type: TokenType, where: Path) -> None:
        """Put a token in its place.

        Raises:
            CameraError: if the embedding has no row for it.
        """
        if not 0 <= number < len(self.texts):
            raise CameraError(
                f"{where}: token {number} ({text!r}) has no row among the {len(self.texts)} of the embedding: "
                "this tokenizer belongs to another model"
            )
        self.texts[number], self.scores[number], self.types[number] = text, score, type

    def add(self, added: Iterable[tuple[int, Mapping[str, Any]]], where: Path) -> list[str]:
        """Put added tokens in their places; special ones steer and are not printed, others are text with plain spaces.

        Returns:
            a sentence for each that the embedding has no row for, which is left out: no text may hold it.
        """
        left_out = []
        for number, token in added:
            text = str(token["content"])
            if number >= len(self.texts):
                left_out.append(f"token {number} ({text!r}) has no row of the embedding: it is left out")
                continue
            steers = token.get("special", False) or text in _STEERING
            if steers or any(text.startswith(start) and text.endswith(end) for start, end in _STEERING_MARKS):
                self.set(number, text, _ADDED_SCORE, TokenType.CONTROL, where)
            else:
                self.set(number, plain(text), _ADDED_SCORE, TokenType.USER_DEFINED, where)
        return left_out

    def numbers(self) -> dict[str, int]:
        """Token ids by text.

        Raises:
            CameraError: if two tokens have the same text.
        """
        found: dict[str, int] = {}
        for number, text in enumerate(self.texts):
            if found.setdefault(text, number) != number:
                raise CameraError(
                    f"tokens {found[text]} and {number} of the vocabulary are both {text!r}, and llama.cpp loads no file "
                    "with such: give one of them another text"
                )
        return found

    def write(self, writer: gguf.GGUFWriter) -> None:
        """Add the vocabulary's keys to a file."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.texts)
        if self.model != "gpt2":
            writer.add_token_scores(self.scores)
        writer.add_token_types([int(type) for type in self.types])
        if self.merges:
            writer.add_token_merges(self.merges)
        for key, value in self.further.items():
            getattr(writer, f"add_{key}")(value)


def plain(text: str) -> str:
    """A token's text with spaces for sentencepiece's marks, as llama.cpp looks for it in a text."""
    return text.replace(WORD_START, " ")
