"""The vocabulary of a tokenizer.json: byte-level BPE, or what sentencepiece's BPE and unigram models became there."""

from base64 import b64decode
from pathlib import Path
from typing import Any

from gguf import TokenType

from camera.errors import CameraError
from camera.formats.piece_vocabulary import normalized
from camera.formats.pre_tokenizers import RULES, ignores_merges, rule_name
from camera.formats.vocabulary import WORD_START, Vocabulary

_BYTES = {f"<0x{byte:02X}>" for byte in range(256)}


def json_vocabulary(form: dict[str, Any], path: Path, rows: int) -> tuple[Vocabulary, list[str]]:
    """The vocabulary of a tokenizer.json, and what the user should know.

    Args:
        form: the file's content.
        path: of the file, for messages.
        rows: of the embedding.

    Raises:
        CameraError: if it does something that llama.cpp cannot, cannot be understood, or does not fit the embedding.
    """
    try:
        model = form["model"]
        for key in ("continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(key):
                raise _refused(path, f"marks parts of words by {model[key]!r} ({key})")
        steps = _flat(form.get("pre_tokenizer"), "pretokenizers")
        if model["type"] == "BPE" and any(step["type"] == "ByteLevel" for step in steps):
            vocabulary, warnings = _of_bytes(form, path, steps, rows)
        elif model["type"] == "BPE" and model.get("byte_fallback"):
            vocabulary, warnings = _of_characters(form, path, steps, rows)
        elif model["type"] == "Unigram":
            vocabulary, warnings = _of_probabilities(form, path, steps, rows)
        else:
            raise _refused(path, f"is a {model['type']} of neither bytes nor pieces")
        warnings += vocabulary.add(((added["id"], added) for added in form.get("added_tokens", ())), path)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CameraError(
            f"{path} cannot be understood ({error!r}): copy it from the source model again"
        ) from None
    return vocabulary, warnings


def _of_bytes(
    form: dict[str, Any], path: Path, steps: list[dict[str, Any]], rows: int
) -> tuple[Vocabulary, list[str]]:
    model = form["model"]
    pre = rule_name(form["pre_tokenizer"], bool(model.get("ignore_merges", False)))
    if pre is None:
        raise CameraError(
            f"{path} splits text by a rule that has no known name in llama.cpp; known are "
            f"{', '.join(RULES)}. With a wrong name every prompt would be misread"
        )
    if any(step["type"] == "ByteLevel" and step.get("add_prefix_space") for step in steps):
        raise _refused(path, "puts a space before a text (ByteLevel with add_prefix_space)")
    for step in _flat(form.get("normalizer"), "normalizers"):
        if step["type"] != "NFC":  # which docs/formats.md tells of
            raise _refused(path, f"changes text by the normalizer {step['type']}")
    vocabulary = Vocabulary.of_padding("gpt2", pre, rows)
    pairs = _merges(model)
    vocabulary.merges = [" ".join(part.replace(" ", "Ġ") for part in pair) for pair in pairs]
    for text, number in model["vocab"].items():
        vocabulary.set(number, text, 0.0, TokenType.NORMAL, path)
    whole = bool(model.get("ignore_merges", False))
    if whole == ignores_merges(pre):
        return vocabulary, []
    made = {left + right for left, right in pairs}
    added = {str(token["content"]) for token in form.get("added_tokens", ())}
    lonely = [text for text in model["vocab"] if len(text) > 1 and text not in made and text not in added]
    if not lonely:
        return vocabulary, []
    does, not_ = ("takes", "does not") if not whole else ("does not take", "does")
    return vocabulary, [
        f"llama.cpp {does} a word that is a token whole, and this tokenizer {not_}: {len(lonely)} tokens that no merge "
        f"makes are concerned ({lonely[0]!r} is one)"
    ]


def _of_characters(
    form: dict[str, Any], path: Path, steps: list[dict[str, Any]], rows: int
) -> tuple[Vocabulary, list[str]]:
    """BPE of characters with bytes for those that have no token: scores in the order of the merges."""
    model = form["model"]
    vocabulary = Vocabulary.of_padding("llama", "default", rows)
    prefix, warnings = _spaces(form, path, steps)
    vocabulary.further["add_space_prefix"] = prefix
    ranks: dict[str, int] = {}
    for left, right in _merges(model):
        ranks.setdefault(left + right, len(ranks))
    unknown = model.get("unk_token")
    for text, number in model["vocab"].items():
        type = TokenType.NORMAL
        if text in _BYTES:
            type = TokenType.BYTE
        elif text == unknown:
            type = TokenType.UNKNOWN
        score = 0.0 if type is not TokenType.NORMAL else -float(ranks.get(text, len(ranks)))
        vocabulary.set(number, text, score, type, path)
    if missing := _BYTES - model["vocab"].keys():
        raise _refused(path, f"has no token for the byte {min(missing)}")
    return vocabulary, warnings


def _of_probabilities(
    form: dict[str, Any], path: Path, steps: list[dict[str, Any]], rows: int
) -> tuple[Vocabulary, list[str]]:
    """Unigram: the most probable pieces; llama.cpp normalises for it as sentencepiece does."""
    model = form["model"]
    vocabulary = Vocabulary.of_padding("t5", "default", rows)
    normalizers = _flat(form.get("normalizer"), "normalizers")
    for step in normalizers:
        if step["type"] == "Precompiled" and step.get("precompiled_charsmap"):
            vocabulary.further["precompiled_charsmap"] = b64decode(step["precompiled_charsmap"])
    squeezes = any(_squeezes(step) for step in normalizers)
    vocabulary.further["add_space_prefix"], warnings = _spaces(form, path, steps, sentencepiece=True)
    vocabulary.further["remove_extra_whitespaces"] = squeezes
    for number, (text, score) in enumerate(model["vocab"]):
        type = TokenType.UNKNOWN if number == model.get("unk_id") else TokenType.NORMAL
        vocabulary.set(number, text, score, TokenType.BYTE if text in _BYTES else type, path)
    return vocabulary, warnings


def _spaces(
    form: dict[str, Any], path: Path, steps: list[dict[str, Any]], sentencepiece: bool = False
) -> tuple[bool, list[str]]:
    """Whether a space is put before a text, by tokenizer.json's two ways to write spaces; and what the user should know.

    Raises:
        CameraError: if a step does anything else.
    """
    prefix, warnings = False, []
    for step in _flat(form.get("normalizer"), "normalizers"):
        kind, pattern = step["type"], step.get("pattern", {})
        if kind == "Prepend" and step["prepend"] in (WORD_START, " "):
            prefix = True
        elif kind == "Precompiled":
            if not sentencepiece:
                warnings.append(normalized("a table of its own"))
        elif kind in ("NFC", "NFKC") or (sentencepiece and kind == "Strip"):
            warnings.append(normalized(kind))
        elif kind == "Replace" and (pattern, step["content"]) == ({"String": " "}, WORD_START):
            pass
        elif not (sentencepiece and _squeezes(step)):
            raise _refused(path, f"changes text by the normalizer {kind}")
    for step in steps:
        if step["type"] == "Metaspace" and step.get("replacement", WORD_START) == WORD_START:
            prefix = (
                step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
                != "never"
            )
        elif step["type"] != "Split" or step["pattern"] != {"String": " "}:  # of which none is left
            raise _refused(path, f"splits text by {step['type']} before it looks for pieces")
    return prefix, warnings


def _squeezes(step: dict[str, Any]) -> bool:
    """Whether a normalizer makes one space of several."""
    return step["type"] == "Replace" and step["pattern"].get("Regex") in (" {2,}", r"\s{2,}")


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    """Pairs in their order, whichever way the file writes them."""
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    return [(left, right) for left, right in pairs]


def _flat(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The steps of a sequence of steps, which may hold further sequences."""
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    return [inner for part in step[key] for inner in _flat(part, key)]


def _refused(path: Path, does: str) -> CameraError:
    return CameraError(
        f"{path} {does}, which llama.cpp cannot: there is no GGUF file in which text becomes the tokens that this model knows"
    )
