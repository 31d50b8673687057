"""Which tokens begin, end and pad a text, and whether the tokenizer adds them, as GGUF keys."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf

from camera.errors import CameraError
from camera.files import read_json

_KINDS = ("bos", "eos", "unk", "sep", "pad", "mask")
_ENDS_BY_TEXT = {
    *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>"),
    *("<end_of_turn>", "<EOT>", "_<EOT>"),
}
"""Tokens at which llama.cpp ends a text without being told."""


@dataclass
class SpecialTokens:
    """Token ids by kind, which begin and end a text that the tokenizer encodes, and what the user should know."""

    ids: dict[str, int] = field(default_factory=dict)
    adds: dict[str, bool] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def write(self, writer: gguf.GGUFWriter) -> None:
        """Add their keys to a file."""
        for kind, number in self.ids.items():
            getattr(writer, f"add_{kind}_token_id")(number)
        for kind, adds in self.adds.items():
            getattr(writer, f"add_add_{kind}_token")(adds)


def special_tokens(
    folder: Path, config: dict[str, Any], form: dict[str, Any] | None, numbers: dict[str, int]
) -> SpecialTokens:
    """The special tokens of a model's folder.

    A text in tokenizer_config.json or special_tokens_map.json wins over an id in config.json, and that over one in
    generation_config.json. Further ends that the latter two list become `eot` and `eom`, unless llama.cpp knows them.

    Args:
        folder: of the model.
        config: tokenizer_config.json.
        form: tokenizer.json; None if a sentencepiece model stands for it.
        numbers: of all tokens, by text.

    Raises:
        CameraError: if a file cannot be understood.
    """
    found = SpecialTokens()
    texts = {**_object(folder / "special_tokens_map.json"), **config}
    stated = [_object(folder / "config.json"), _object(folder / "generation_config.json")]
    for kind in _KINDS:
        text = _text(texts.get(f"{kind}_token"))
        candidates = [numbers[text]] if text in numbers else []
        for source in stated:
            candidates += _ids(source.get(f"{kind}_token_id"), kind, len(numbers), found.warnings)
        if candidates:
            found.ids[kind] = candidates[0]
        if kind == "eos":
            _add_ends(
                found, list(dict.fromkeys(candidates)), {number: text for text, number in numbers.items()}
            )
    _add_added(found, config, form, numbers)
    return found


def _add_ends(found: SpecialTokens, ends: list[int], texts: dict[int, str]) -> None:
    """Keys for the ends beside the first."""
    further = [number for number in ends[1:] if texts[number] not in _ENDS_BY_TEXT]
    found.ids |= dict(zip(("eot", "eom"), further, strict=False))
    if lost := [texts[number] for number in further[2:]]:
        found.warnings.append(
            f"a GGUF file names three tokens that end a text, and this model has more: llama.cpp goes on after {lost}"
        )


def _add_added(
    found: SpecialTokens, config: dict[str, Any], form: dict[str, Any] | None, numbers: dict[str, int]
) -> None:
    """Whether the tokenizer puts BOS before a text and EOS behind it.

    What tokenizer.json does after splitting decides, as in transformers. Without such a file the flags in
    tokenizer_config.json do, and a sentencepiece model without them gets BOS, as Llama's tokenizer does.
    """
    if form is None:
        for kind, default in (("bos", True), ("eos", False)):
            found.adds[kind] = config.get(f"add_{kind}_token", default) is True and kind in found.ids
        return
    first, last = _surroundings(form.get("post_processor"))
    for kind, around in (("bos", first), ("eos", last)):
        if len(around) > 1 or not set(around) <= numbers.keys():
            found.warnings.append(
                f"the tokenizer puts {' '.join(around)} around a text, and llama.cpp one token at most: it puts none there, "
                "so a prompt has to hold them"
            )
        elif around and found.ids.setdefault(kind, numbers[around[0]]) != numbers[around[0]]:
            if kind == "eos":  # a generation still ends where it did
                found.ids.setdefault("eot", found.ids["eos"])
            found.ids[kind] = numbers[around[0]]
        found.adds[kind] = len(around) == 1 and around[0] in numbers


def _surroundings(processor: dict[str, Any] | None) -> tuple[list[str], list[str]]:
    """The special tokens that a post-processor of tokenizer.json puts before and behind a single text."""
    if processor is None or processor["type"] == "ByteLevel":
        return [], []
    if processor["type"] == "Sequence":
        first: list[str] = []
        last: list[str] = []
        for each in processor["processors"]:
            before, behind = _surroundings(each)
            first, last = before + first, last + behind
        return first, last
    if processor["type"] in ("RobertaProcessing", "BertProcessing"):
        return [processor["cls"][0]], [processor["sep"][0]]
    parts = processor["single"]
    at = next(number for number, part in enumerate(parts) if "Sequence" in part)
    around = [
        [str(part["SpecialToken"]["id"]) for part in side if "SpecialToken" in part]
        for side in (parts[:at], parts[at + 1 :])
    ]
    return around[0], around[1]


def _text(token: Any) -> str | None:
    """A token's text, however a config writes it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _ids(value: Any, kind: str, rows: int, warnings: list[str]) -> list[int]:
    """The ids that a config states: one, a list, or none; -1 is what old configs write for none."""
    given = value if isinstance(value, list) else [value]
    numbers = [number for number in given if type(number) is int and number >= 0]
    if beyond := [number for number in numbers if number >= rows]:
        warnings.append(
            f"{kind}_token_id {beyond[0]} has no row among the {rows} of the embedding: it is left out"
        )
    return [number for number in numbers if number < rows]


def _object(path: Path) -> dict[str, Any]:
    """The JSON object of a file that need not be there."""
    content = read_json(path) if path.is_file() else {}
    if not isinstance(content, dict):
        raise CameraError(f"{path} does not hold a JSON object: copy it from the source model again")
    return content
