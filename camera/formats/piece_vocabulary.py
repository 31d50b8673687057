"""The vocabulary of a sentencepiece model, from `tokenizer.model`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf import TokenType

from camera.errors import CameraError
from camera.files import read_json
from camera.formats.vocabulary import Vocabulary, plain
from camera.guarded import run_guarded
from camera.held import opened

if TYPE_CHECKING:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

_UNIGRAM, _BPE = 1, 2
"""sentencepiece's numbers of its models."""


def read_pieces(path: Path) -> "ModelProto | None":
    """A sentencepiece model; None if there is no such file, or it is something else, as Meta's tiktoken lists are."""
    if not path.is_file():
        return None
    # Two bytes of a file stand for a piece of a hundred in memory.
    if not run_guarded(lambda: _parsed(path) is not None, str(path)):
        return None
    return _parsed(path)


def _parsed(path: Path) -> "ModelProto | None":
    from google.protobuf.message import DecodeError  # only this kind of tokenizer needs it
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

    model = ModelProto()
    try:
        with opened(path) as file:
            model.ParseFromString(file.read())
    except DecodeError:
        return None
    return model if model.pieces else None


def piece_vocabulary(
    model: "ModelProto", folder: Path, config: dict[str, Any], rows: int
) -> tuple[Vocabulary, list[str]]:
    """The vocabulary of a sentencepiece model and of the tokens added to it; and what the user should know.

    Raises:
        CameraError: if its kind is not supported, or it does not fit the embedding.
    """
    path = folder / "tokenizer.model"
    kind = model.trainer_spec.model_type
    if kind not in (_UNIGRAM, _BPE):
        raise CameraError(
            f"{path} splits text into words or characters, and llama.cpp reads sentencepiece models of the kinds BPE and "
            "unigram: there is no GGUF file of such a model"
        )
    warnings: list[str] = []
    prefix = bool(model.normalizer_spec.add_dummy_prefix)
    stated = config.get("add_prefix_space")
    if isinstance(stated, bool) and stated != prefix:
        warnings.append(
            f"tokenizer_config.json says add_prefix_space {stated} and tokenizer.model {prefix}: the config is followed"
        )
        prefix = stated
    vocabulary = Vocabulary.of_padding("llama" if kind == _BPE else "t5", "default", rows)
    vocabulary.further["add_space_prefix"] = prefix
    normalizer = model.normalizer_spec
    if kind == _UNIGRAM:
        vocabulary.further["remove_extra_whitespaces"] = bool(normalizer.remove_extra_whitespaces)
        if normalizer.precompiled_charsmap:
            vocabulary.further["precompiled_charsmap"] = bytes(normalizer.precompiled_charsmap)
    elif normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        warnings.append(normalized(normalizer.name or "its own table"))
    known = {piece.piece for piece in model.pieces}
    for number, piece in enumerate(model.pieces):
        text, type = piece.piece, TokenType(piece.type)
        if type is TokenType.USER_DEFINED:
            if prefix and (len(text) == 1 or _merges_make(text, known)):
                type = TokenType.NORMAL
            else:
                text = plain(text)
        vocabulary.set(number, text, piece.score, type, path)
    warnings += vocabulary.add(_added_tokens(folder, config), folder / "tokenizer_config.json")
    return vocabulary, warnings


def normalized(name: str) -> str:
    """What to tell people of a tokenizer that changes a text's characters first."""
    return (
        f"the tokenizer normalises text ({name}) and llama.cpp does not: text with compatibility characters or several "
        "spaces in a row gives other tokens there"
    )


def _merges_make(text: str, known: set[str]) -> bool:
    """Whether merging neighbours that are tokens together can arrive at a text.

    llama.cpp puts a space behind a user-defined token where it puts one before texts, sentencepiece puts none. So a piece
    that ordinary merges arrive at is an ordinary one, and only what they cannot make is looked for as a whole.
    """
    reachable = {(start, start + 1) for start in range(len(text))}
    for length in range(2, len(text) + 1):
        for start in range(len(text) - length + 1):
            end = start + length
            if text[start:end] in known and any(
                (start, middle) in reachable and (middle, end) in reachable
                for middle in range(start + 1, end)
            ):
                reachable.add((start, end))
    return (0, len(text)) in reachable


def _added_tokens(folder: Path, config: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """Tokens beside the sentencepiece model; where both files have one, tokenizer_config.json wins."""
    added: dict[int, dict[str, Any]] = {}
    path = folder / "added_tokens.json"
    try:
        if path.is_file():
            added |= {int(number): {"content": text} for text, number in read_json(path).items()}
        path = folder / "tokenizer_config.json"
        added |= {
            int(number): dict(token) for number, token in config.get("added_tokens_decoder", {}).items()
        }
        return [(number, added[number]) for number in sorted(added) if added[number]["content"] is not None]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CameraError(f"{path}: the added tokens cannot be understood ({error!r})") from None
