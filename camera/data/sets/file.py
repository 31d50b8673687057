"""Text and token files of the user's own: .txt, .jsonl, .parquet, folders of them, and .safetensors of tokens."""

import json
from collections.abc import Callable
from pathlib import Path

import torch

from camera.checkpoints.safetensors_file import read_tensors
from camera.data.sets import DATA_SETS, DataSet, Documents
from camera.errors import CameraError
from camera.options import DatasetOptions

TOKENS_SUFFIX = ".safetensors"
TOKENS_NAME = "input_ids"


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
        CameraError: naming file and line, if something is missing, or is no text, JSON or UTF-8.
    """
    texts = [text for file in text_files(path) for text in _READERS[file.suffix.lower()](file, field)]
    return Documents(texts, joiner="\n\n", source=str(path))


def text_files(path: Path) -> list[Path]:
    """The text files that a path stands for, sorted by relative name.

    Raises:
        CameraError: if there is none.
    """
    kinds = ", ".join(_READERS)
    if path.is_file():
        if path.suffix.lower() not in _READERS:
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
        and file.suffix.lower() in _READERS
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
        raise CameraError(
            f"{path} has no tensor {TOKENS_NAME}; it has {', '.join(sorted(tensors)) or 'none'}"
        )
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


def _read_txt(file: Path, field: str) -> list[str]:
    return ["".join(text for _, text in lines(file))]


def _read_jsonl(file: Path, field: str) -> list[str]:
    texts = []
    for number, line in lines(file):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise CameraError(f"{file}, line {number}: not valid JSON ({error})") from None
        if not isinstance(row, dict) or field not in row:
            has = ", ".join(row) if isinstance(row, dict) else f"a JSON {type(row).__name__}"
            raise CameraError(f"{file}, line {number}: no field {field!r} (it has {has}); set `field`")
        texts.append(_text(row[field], field, f"{file}, line {number}"))
    return texts


def _read_parquet(file: Path, field: str) -> list[str]:
    import pyarrow  # needed for this one kind of file only
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(file).names
        if field not in names:
            raise CameraError(f"{file}: no field {field!r} (it has {', '.join(names)}); set `field`")
        column = pyarrow.parquet.read_table(file, columns=[field]).column(field).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise CameraError(f"{file} is no readable parquet file: {error}") from None
    return [_text(value, field, f"{file}, row {number}") for number, value in enumerate(column, 1)]


def _text(value: object, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise CameraError(f"{where}: {field!r} is {type(value).__name__}, not text; set `field`")
    return value


def lines(file: Path) -> list[tuple[int, str]]:
    """Numbered lines with their ends, the last without. Only a line feed ends a line, as JSON Lines has it."""
    found = []
    for number, raw in enumerate(file.read_bytes().split(b"\n"), 1):
        try:
            found.append((number, raw.decode("utf-8-sig" if number == 1 else "utf-8") + "\n"))
        except UnicodeDecodeError as error:
            raise CameraError(f"{file}, line {number}: not valid UTF-8 ({error}); convert the file") from None
    number, last = found[-1]
    found[-1] = number, last.removesuffix("\n")
    return found


_READERS: dict[str, Callable[[Path, str], list[str]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}

DATA_SETS.register("file", Files())
