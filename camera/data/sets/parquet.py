"""The texts of a parquet file: a kilobyte of it can stand for gigabytes, so a child process reads it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from camera.data.sets.lines import MAX_TEXT_BYTES, refuse_more_than_is_read, text_of
from camera.errors import CameraError
from camera.guarded import Limits, run_guarded
from camera.held import opened as open_held

_ROWS_AT_ONCE = 4096
_BYTES_PER_ROW = 64
"""What a row takes beside its characters."""
_TIMES = 30
"""So much more than its size no honest file holds; text is packed to a third or a fifth."""


def read_parquet(file: Path, field: str) -> list[str]:
    """The texts of a column, in the order of rows.

    Raises:
        CameraError: if it is no such file, has no such column of text, or more text than is read of one data set.
    """
    return run_guarded(lambda: list(_texts(file, field, MAX_TEXT_BYTES)), str(file), _limits(file))


def refuse_unreasonable_parquet(file: Path, field: str) -> None:
    """Raise CameraError as `read_parquet`, but of a file whose rows are read as they are needed: it may be larger."""
    most = max(MAX_TEXT_BYTES, _TIMES * file.stat().st_size)
    run_guarded(lambda: sum(1 for _ in _texts(file, field, most)), str(file), _limits(file))


def _limits(file: Path) -> Limits:
    size = file.stat().st_size
    return Limits(memory_bytes=(1 << 30) + min(6 * size, 4 * MAX_TEXT_BYTES), seconds=45 + 100e-9 * size)


def _texts(file: Path, field: str, most: int) -> Iterator[str]:
    import pyarrow  # needed for this one kind of file only
    import pyarrow.parquet

    pyarrow.set_memory_pool(pyarrow.system_memory_pool())  # the others reserve more than a child may have
    number = total = 0
    try:
        with open_held(file) as stored:
            names = pyarrow.parquet.read_schema(stored).names
        if field not in names:
            raise CameraError(f"{file}: no field {field!r} (it has {', '.join(names)}); set `field`")
        with (
            open_held(file) as stored,
            pyarrow.parquet.ParquetFile(stored, read_dictionary=[field]) as opened,
        ):
            for batch in opened.iter_batches(_ROWS_AT_ONCE, columns=[field], use_threads=False):
                for value in _values(batch.column(0)):
                    number += 1
                    text = text_of(value, field, f"{file}, row {number}")
                    total += len(text) + _BYTES_PER_ROW
                    if total > most:
                        refuse_more_than_is_read(file, total)
                    yield text
    except MemoryError:
        raise CameraError(f"{file} takes more memory than its size allows: look at what it is") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise CameraError(f"{file} is no readable parquet file: {error}") from None


def _values(column: Any) -> list[object]:
    """The values of a part of a column; the same object where the file has the same entry of its dictionary."""
    import pyarrow

    if not isinstance(column, pyarrow.DictionaryArray):
        return list(column.to_pylist())
    entries = column.dictionary.to_pylist()
    return [None if index is None else entries[index] for index in column.indices.to_pylist()]
