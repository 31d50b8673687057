"""A Hugging Face tokenizer as GGUF keys."""

import json
from pathlib import Path
from typing import Any

import gguf

from camera.checkpoints.tokenizer import load_tokenizer
from camera.errors import CameraError
from camera.files import read_json
from camera.formats.chat_templates import DEFAULT, chat_templates
from camera.formats.json_vocabulary import json_vocabulary
from camera.formats.piece_vocabulary import piece_vocabulary, read_pieces
from camera.formats.special_tokens import special_tokens
from camera.formats.vocabulary import Vocabulary


def write_tokenizer(writer: gguf.GGUFWriter, folder: Path, rows: int) -> list[str]:
    """Add vocabulary, special tokens and chat templates to a file.

    Args:
        writer: of the file.
        folder: holds tokenizer.model (sentencepiece), or tokenizer.json, or what transformers makes such a file of, and
            the configs.
        rows: of the embedding; the vocabulary is padded to so many.

    Returns:
        what the user should know, a sentence each.

    Raises:
        CameraError: if there is no such tokenizer, llama.cpp has no counterpart of it, or it does not fit the embedding.
    """
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    if not isinstance(config, dict):
        raise CameraError(f"{path} does not hold a JSON object: copy it from the source model again")
    vocabulary, form, warnings = _vocabulary(folder, config, rows)
    try:
        special = special_tokens(folder, config, form, vocabulary.numbers())
    except (KeyError, TypeError, AttributeError, StopIteration) as error:
        raise CameraError(f"{folder}: the special tokens cannot be understood ({error!r})") from None
    templates = chat_templates(folder, config)
    vocabulary.write(writer)
    special.write(writer)
    if templates.keys() == {DEFAULT}:
        writer.add_chat_template(templates[DEFAULT])
    elif templates:
        writer.add_chat_template([{"name": name, "template": text} for name, text in templates.items()])
        if (names := writer.kv_data[-1].get(gguf.Keys.Tokenizer.CHAT_TEMPLATES)) is not None:
            names.value = sorted(names.value)  # gguf holds them in a set, whose order differs from run to run
        if DEFAULT not in templates:
            warnings.append("no chat template is named default: llama.cpp uses none unless it is told a name")
    return [*warnings, *special.warnings]


def _vocabulary(
    folder: Path, config: dict[str, Any], rows: int
) -> tuple[Vocabulary, dict[str, Any] | None, list[str]]:
    """The vocabulary, what tokenizer.json holds (None for a sentencepiece model without it), and what to know of them."""
    pieces = read_pieces(folder / "tokenizer.model")
    if pieces is None:
        form = _form(folder)
        vocabulary, warnings = json_vocabulary(form, folder / "tokenizer.json", rows)
        return vocabulary, form, warnings
    vocabulary, warnings = piece_vocabulary(pieces, folder, config, rows)
    return vocabulary, _form(folder) if (folder / "tokenizer.json").is_file() else None, warnings


def _form(folder: Path) -> dict[str, Any]:
    """What tokenizer.json holds, or would hold had transformers saved the tokenizer."""
    path = folder / "tokenizer.json"
    if path.is_file():
        form = read_json(path)
    elif (folder / "tokenizer.model").is_file():
        raise CameraError(
            f"{folder / 'tokenizer.model'} is no sentencepiece model, and there is no tokenizer.json: copy the tokenizer "
            "of the source model again"
        )
    elif (folder / "vocab.json").is_file():
        form = json.loads(load_tokenizer(folder).backend_tokenizer.to_str())
    else:
        raise CameraError(
            f"{folder} has neither tokenizer.model nor tokenizer.json: copy the tokenizer of the source model "
            "there (a slow tokenizer becomes a tokenizer.json by transformers' save_pretrained)"
        )
    if not isinstance(form, dict):
        raise CameraError(f"{path} does not hold a JSON object: copy it from the source model again")
    return form
