"""Text and token files of the user's own: .txt, .jsonl, .parquet, folders of them, and .safetensors of tokens."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from camera.checkpoints.safetensors_file import read_tensors
from camera.data.sets import DATA_SETS, DataSet, Documents
from camera.data.sets.lines import (
    MAX_ROW_BYTES,
    MAX_TEXT_BYTES,
    lines,
    no_field,
    refuse_more_than_is_read,
    row,
    text_bytes,
    text_of,
)
from camera.data.sets.parquet import ParquetReader
from camera.errors import CameraError
from camera.options import DatasetOptions
from camera.units import few

TOKENS_SUFFIX = ".safetensors"
TOKENS_NAME = "input_ids"
_SUFFIXES = (".txt", ".jsonl", ".parquet")


class Files(DataSet):
    """What a path of the user's names; it has one part."""

    takes_path = needs_path = True

    def read(self, options: DatasetOptions) -> Documents:
        if _holds_tokens(options):
            raise CameraError(
                f"{options.path} holds tokens, not text: give a .txt, .jsonl or .parquet file here"
            )
        return read(_path(options), options.field)

    def ready_windows(self, options: DatasetOptions, vocab_size: int) -> torch.Tensor | None:
        return read_input_ids(_path(options), vocab_size) if _holds_tokens(options) else None


def _path(options: DatasetOptions) -> Path:
    assert options.path is not None  # DatasetOptions has seen to it
    return options.path


def _holds_tokens(options: DatasetOptions) -> bool:
    return _path(options).suffix.lower() == TOKENS_SUFFIX


def read(path: Path, field: str) -> Documents:
    """The documents of one file, or of all text files below a folder in the order of their names.

    A .txt file is one document; a .jsonl or .parquet file is one document per row, blank ones too: of a copy of a data set
    they are part of what its tokens are.

    Args:
        path: file or folder.
        field: the field of .jsonl and .parquet that holds the text.

    Raises:
        CameraError: naming file and line, if something is missing, or is no text, JSON or UTF-8, or is too large.
    """
    files = text_files(path)
    refuse_more_than_is_read(path, sum(file.stat().st_size for file in files if _kind(file) == ".txt"))
    texts: list[str] = []
    left = MAX_TEXT_BYTES
    with ParquetReader() as read_parquet:
        for file in files:
            kind = _kind(file)
            if kind == ".parquet":
                found: Iterable[str] = read_parquet(file, field, left)
            else:
                found = _jsonl_texts(file, field) if kind == ".jsonl" else [_txt(file)]
            for text in found:
                left -= text_bytes(text)
                if left < 0:
                    refuse_more_than_is_read(path, MAX_TEXT_BYTES + 1)
                texts.append(text)
    return Documents(texts, joiner="\n\n", source=str(path))


def _kind(file: Path) -> str:
    return file.suffix.lower()


def text_files(path: Path) -> list[Path]:
    """The text files that a path stands for, sorted by relative name.

    Raises:
        CameraError: if there is none.
    """
    kinds = ", ".join(_SUFFIXES)
    if path.is_file():
        if _kind(path) not in _SUFFIXES:
            raise CameraError(
                f"{path}: not a kind of text file that is read ({kinds}); convert it to one of them"
            )
        return [path]
    if not path.is_dir():
        raise CameraError(f"{path} does not exist: `path` names the file or folder of texts")
    files = [
        file
        for file in path.rglob("*")
        if file.is_file()
        and _kind(file) in _SUFFIXES
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    if not files:
        raise CameraError(f"{path} holds no text file ({kinds})")
    return sorted(files, key=lambda file: file.relative_to(path).as_posix())


def read_input_ids(path: Path, vocab_size: int) -> torch.Tensor:
    """Ready-made windows of tokens: the tensor `input_ids` of a safetensors file, int64 [samples, length].

    Raises:
        CameraError: if it is missing, empty, of another dtype or shape, or holds ids outside the vocabulary.
    """
    tensors = read_tensors(path)
    if TOKENS_NAME not in tensors:
        raise CameraError(f"{path} has no tensor {TOKENS_NAME}; it has {few(sorted(tensors)) or 'none'}")
    ids_SL = tensors[TOKENS_NAME]
    if ids_SL.dtype != torch.int64 or ids_SL.ndim != 2 or not ids_SL.numel():
        raise CameraError(
            f"{path}: {TOKENS_NAME} is {ids_SL.dtype} {list(ids_SL.shape)}; "
            "it must be int64 [samples, length] and not empty"
        )
    low, high = int(ids_SL.min()), int(ids_SL.max())
    if low < 0 or high >= vocab_size:
        raise CameraError(
            f"{path}: {TOKENS_NAME} holds {low if low < 0 else high}, and the vocabulary has ids 0 to "
            f"{vocab_size - 1}: it was made with another tokenizer"
        )
    return ids_SL


def _txt(file: Path) -> str:
    return "".join(text for _, text in lines(file))


def _jsonl_texts(file: Path, field: str) -> Iterator[str]:
    for number, line in lines(file, MAX_ROW_BYTES):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        record = row(line, where)
        if not isinstance(record, dict) or field not in record:
            raise no_field(
                field,
                where,
                list(record) if isinstance(record, dict) else [f"a JSON {type(record).__name__}"],
            )
        yield text_of(record[field], field, where)


DATA_SETS.register("file", Files())
