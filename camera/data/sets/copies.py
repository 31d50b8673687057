"""The rows of a local copy of a hub data set, as the hub has them: for machines without a network."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from camera.data.sets.lines import lines, refuse_more_than_is_read, refuse_unreasonable_records
from camera.data.sets.parquet import refuse_unreasonable_parquet
from camera.errors import CameraError
from camera.files import copy_file

_LINES = (".txt", ".raw", ".tokens")
"""Endings of plain text, of which each line is a row."""
_ROWS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".jsonl.gz": "json", ".json.gz": "json"}
"""The reader of the library `datasets` by the ending of a file of rows."""


def rows_of_copy(path: Path, part: str, *, within: str | None, field: str, by_line: bool) -> Sequence[str]:
    """The texts of one part, every row kept as it is, blank ones too.

    Args:
        path: a file, or a folder with one file of the part, or the hub's parquet files.
        part: the hub's name of the part; files of a folder are told by it.
        within: a file or folder of the hub's repository that alone stands for the data set; None for all.
        field: of rows that are records: the one that holds the text.
        by_line: whether lines of plain text are rows.

    Raises:
        CameraError: naming what is missing or cannot be read.
    """
    files = [path] if path.is_file() else _of_part(path, part, within)
    kinds = {_kind(file) for file in files}
    if len(kinds) > 1:
        raise CameraError(
            f"{path} holds {part} rows in several kinds of files: give the `path` of one of them"
        )
    kind = kinds.pop()
    if kind is not None:
        return _records(files, kind, field)
    if not by_line:
        raise CameraError(
            f"{files[0]}: plain text does not tell where a document ends; give .jsonl, .json.gz or .parquet"
        )
    refuse_more_than_is_read(path, sum(file.stat().st_size for file in files))
    # The hub's rows are lines with their ends; of a blank one it keeps nothing.
    return [line if line.strip() else "" for file in files for _, line in lines(file) if line]


def _of_part(folder: Path, part: str, within: str | None) -> list[Path]:
    if not folder.is_dir():
        raise CameraError(f"{folder} does not exist: `path` names the file or folder of a local copy")
    known = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and _ending(file) is not None and part in file.name
    ]
    name = Path(within).name if within else ""
    found = [file for file in known if name in file.relative_to(folder).parts] or known
    if not found or (len(found) > 1 and _kind(found[0]) != "parquet"):
        several = f"{len(found)} files" if found else "no file"
        raise CameraError(f"{folder} holds {several} of the part {part}: give the `path` of one file")
    return found


def _ending(file: Path) -> str | None:
    name = file.name.lower()
    return next((ending for ending in (*_ROWS, *_LINES) if name.endswith(ending)), None)


def _kind(file: Path) -> str | None:
    """The library's reader; None for plain text."""
    ending = _ending(file)
    if ending is None:
        raise CameraError(
            f"{file}: no kind of file that a copy is read from ({', '.join((*_ROWS, *_LINES))})"
        )
    return _ROWS.get(ending)


def _records(files: list[Path], kind: str, field: str) -> Sequence[str]:
    """A column that reads rows as they are asked for, from a map of a file that has no name any more: one part of C4 is
    800 MB."""
    import datasets  # slow to import

    for file in files:
        if kind == "parquet":
            refuse_unreasonable_parquet(file, field)
        else:
            refuse_unreasonable_records(file)
    only = {"columns": [field]} if kind == "parquet" else {}  # what else is there was not looked at
    cache = Path(datasets.config.HF_DATASETS_CACHE)  # on a disk; a temporary folder may be in memory
    cache.mkdir(parents=True, exist_ok=True)
    # The library opens files itself, and takes for read before what has the name and time of another.
    with TemporaryDirectory(prefix="camera-", dir=cache, ignore_cleanup_errors=True) as scratch:
        copies = [Path(scratch, f"{number}{_ending(file)}") for number, file in enumerate(files)]
        try:
            for file, copy in zip(files, copies, strict=True):
                copy_file(file, copy)
            rows: Any = datasets.load_dataset(
                kind, data_files=list(map(str, copies)), split="train", cache_dir=scratch, **only
            )
        except (ValueError, OSError, datasets.exceptions.DatasetGenerationError) as error:
            raise CameraError(f"{files[0]} cannot be read: {error.__cause__ or error}") from error
    if field not in rows.column_names:
        raise CameraError(
            f"{files[0]}: no field {field!r} (it has {', '.join(rows.column_names)}); set `field`"
        )
    if rows.features[field].dtype not in ("string", "large_string"):
        raise CameraError(f"{files[0]}: {field!r} is {rows.features[field].dtype}, not text; set `field`")
    column: Sequence[str] = rows[field]
    return column
