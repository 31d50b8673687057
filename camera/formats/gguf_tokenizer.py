"""A Hugging Face tokenizer as GGUF keys: sentencepiece, or byte-level BPE."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType

from camera.errors import CameraError
from camera.files import read_json
from camera.formats.pre_tokenizers import RULES, rule_name

_ADDED_SCORE = -1000.0
_PADDING_SCORE = -10000.0


@dataclass
class _Vocabulary:
    """Texts, scores and types by token id; ids that the tokenizer leaves out are unused padding."""

    texts: list[str]
    scores: list[float]
    types: list[TokenType]

    @classmethod
    def of_padding(cls, rows: int) -> "_Vocabulary":
        return cls(
            [f"[PAD{number}]" for number in range(rows)], [_PADDING_SCORE] * rows, [TokenType.UNUSED] * rows
        )

    def set(self, number: int, text: str, score: float, type: TokenType, where: Path) -> None:
        if not 0 <= number < len(self.texts):
            raise CameraError(
                f"{where}: token {number} ({text!r}) has no row among the {len(self.texts)} of the embedding: "
                "this tokenizer belongs to another model"
            )
        self.texts[number], self.scores[number], self.types[number] = text, score, type


def write_tokenizer(writer: gguf.GGUFWriter, folder: Path, rows: int) -> list[str]:
    """Add vocabulary, special tokens and chat template to a file.

    Args:
        writer: of the file.
        folder: holds tokenizer.model (sentencepiece), or tokenizer.json (byte-level BPE), and the configs.
        rows: of the embedding; the vocabulary is padded to so many.

    Returns:
        what the user should know, a sentence each.

    Raises:
        CameraError: if there is no such tokenizer, it is of another kind, or does not fit the embedding.
    """
    warnings: list[str] = []
    is_sentencepiece = (folder / "tokenizer.model").is_file()
    if is_sentencepiece:
        _write_sentencepiece(writer, folder, rows, warnings)
    elif (folder / "tokenizer.json").is_file():
        _write_byte_bpe(writer, folder, rows)
    else:
        raise CameraError(
            f"{folder} has neither tokenizer.model nor tokenizer.json: copy the tokenizer of the source model "
            "there (a slow tokenizer becomes a tokenizer.json by transformers' save_pretrained)"
        )
    try:
        special = gguf.SpecialVocab(folder, load_merges=not is_sentencepiece, n_vocab=rows)
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise CameraError(f"{folder}: the special tokens cannot be read ({error})") from None
    if not isinstance(special.chat_template, str | None):
        warnings.append("the tokenizer has several chat templates; llama.cpp uses the one named default")
    special.add_to_gguf(writer, quiet=True)
    return warnings


def _write_sentencepiece(writer: gguf.GGUFWriter, folder: Path, rows: int, warnings: list[str]) -> None:
    from google.protobuf.message import DecodeError  # only this kind of tokenizer needs it
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

    path = folder / "tokenizer.model"
    model = ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError:
        model.Clear()
    if not model.pieces:
        raise CameraError(f"{path} is no sentencepiece model: copy it from the source model again")
    vocabulary = _Vocabulary.of_padding(rows)
    for number, piece in enumerate(model.pieces):
        vocabulary.set(number, piece.piece, piece.score, TokenType(piece.type), path)
    config = _tokenizer_config(folder)
    for number, added in _added_tokens(folder, config):
        type, text = _added_type(added)
        vocabulary.set(number, text, _ADDED_SCORE, type, folder / "tokenizer_config.json")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    _write_vocabulary(writer, vocabulary, with_scores=True)
    prefix = bool(model.normalizer_spec.add_dummy_prefix)
    stated = config.get("add_prefix_space")
    if isinstance(stated, bool) and stated != prefix:
        warnings.append(
            f"tokenizer_config.json says add_prefix_space {stated} and tokenizer.model {prefix}: the config is followed"
        )
        prefix = stated
    writer.add_add_space_prefix(prefix)


def _write_byte_bpe(writer: gguf.GGUFWriter, folder: Path, rows: int) -> None:
    path = folder / "tokenizer.json"
    tokenizer = read_json(path)
    try:
        model = tokenizer["model"]
        is_byte_level = model["type"] == "BPE" and tokenizer["decoder"]["type"] == "ByteLevel"
        if not is_byte_level:
            raise CameraError(
                f"{path} is no byte-level BPE, and there is no tokenizer.model beside it: copy tokenizer.model "
                "from the source model"
            )
        pre = rule_name(tokenizer["pre_tokenizer"], bool(model.get("ignore_merges", False)))
        vocabulary = _Vocabulary.of_padding(rows)
        for text, number in model["vocab"].items():
            vocabulary.set(number, text, 0.0, TokenType.NORMAL, path)
        for added in tokenizer.get("added_tokens", ()):
            type, text = _added_type(added)
            vocabulary.set(added["id"], text, 0.0, type, path)
    except (KeyError, TypeError, AttributeError) as error:
        raise CameraError(
            f"{path} cannot be understood ({error!r}): copy it from the source model again"
        ) from None
    if pre is None:
        raise CameraError(
            f"{path} splits text by a rule that has no known name in llama.cpp; known are "
            f"{', '.join(RULES)}. With a wrong name every prompt would be misread"
        )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    _write_vocabulary(writer, vocabulary, with_scores=False)


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


def _added_type(added: dict[str, Any]) -> tuple[TokenType, str]:
    """Special tokens steer and are not printed; other added tokens are text, with plain spaces."""
    text = str(added["content"])
    if added.get("special", False):
        return TokenType.CONTROL, text
    return TokenType.USER_DEFINED, text.replace("\u2581", " ")


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    if not isinstance(config, dict):
        raise CameraError(f"{path} does not hold a JSON object: copy it from the source model again")
    return config


def _write_vocabulary(writer: gguf.GGUFWriter, vocabulary: _Vocabulary, *, with_scores: bool) -> None:
    texts: Sequence[str] = vocabulary.texts
    writer.add_token_list(texts)
    if with_scores:
        writer.add_token_scores(vocabulary.scores)
    writer.add_token_types([int(type) for type in vocabulary.types])
