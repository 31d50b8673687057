"""The texts of a parquet file: a kilobyte of it can stand for gigabytes, so a child process reads it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from camera.data.sets.lines import MAX_TEXT_BYTES, no_field, refuse_more_than_is_read, text_bytes, text_of
from camera.errors import CameraError
from camera.guarded import Guarded, Limits, run_guarded
from camera.held import opened as open_held

_ROWS_AT_ONCE = 1024
_MOST_REPEATED_BYTES = 4 << 20
"""Of a column's rows stored together, unpacked: less may stand for gigabytes and is read as a dictionary, which is copied
for every few rows."""
_TIMES = 30
"""So much more than its size no honest file holds; text is packed to a third or a fifth."""


class ParquetReader:
    """Reads files of one data set in one child process: to start one takes a tenth of a second."""

    def __init__(self) -> None:
        self._guarded = Guarded(_texts_of, "", lambda file, *_: _limits(file))

    def __enter__(self) -> "ParquetReader":
        return self

    def __exit__(self, *raised: object) -> None:
        self._guarded.close()

    def __call__(self, file: Path, field: str, most: int = MAX_TEXT_BYTES) -> list[str]:
        """The texts of a column, in the order of rows.

        Raises:
            CameraError: if it is no such file, has no such column of text, or more than `most` bytes of text.
        """
        self._guarded.subject = str(file)
        return self._guarded(file, field, most)


def refuse_unreasonable_parquet(file: Path, field: str) -> None:
    """Raise CameraError as `read_parquet`, but of a file whose rows are read as they are needed: it may be larger."""
    most = max(MAX_TEXT_BYTES, _TIMES * file.stat().st_size)
    run_guarded(lambda: sum(1 for _ in _texts(file, field, most)), str(file), _limits(file))


def _limits(file: Path) -> Limits:
    size = file.stat().st_size
    return Limits(memory_bytes=(1 << 30) + min(12 * size, 4 * MAX_TEXT_BYTES), seconds=45 + 100e-9 * size)


def _texts_of(file: Path, field: str, most: int) -> list[str]:
    return list(_texts(file, field, most))


def _texts(file: Path, field: str, most: int) -> Iterator[str]:
    import pyarrow  # needed for this one kind of file only
    import pyarrow.parquet

    pyarrow.set_memory_pool(pyarrow.system_memory_pool())  # the others reserve more than a child may have
    pyarrow.set_io_thread_count(1)  # each reserves as much again
    number = total = 0
    try:
        with open_held(file) as stored:
            facts = pyarrow.parquet.read_metadata(stored)
        names = facts.schema.to_arrow_schema().names
        if field not in names:
            raise no_field(field, str(file), names)
        repeated = [field] if _stored_bytes(facts, field) < _MOST_REPEATED_BYTES else None
        with (
            open_held(file) as stored,
            pyarrow.parquet.ParquetFile(stored, read_dictionary=repeated) as opened,
        ):
            for batch in opened.iter_batches(_ROWS_AT_ONCE, columns=[field], use_threads=False):
                for value in _values(batch.column(0)):
                    number += 1
                    text = text_of(value, field, f"{file}, row {number}")
                    total += text_bytes(text)
                    if total > most:
                        refuse_more_than_is_read(file, MAX_TEXT_BYTES + 1)
                    yield text
    except MemoryError:
        raise CameraError(f"{file} takes more memory than its size allows: look at what it is") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise CameraError(f"{file} is no readable parquet file: {error}") from None


def _stored_bytes(facts: Any, field: str) -> int:
    """The largest part of the column, as stored and unpacked."""
    columns = [number for number in range(facts.num_columns) if facts.schema.column(number).path == field]
    groups = map(facts.row_group, range(facts.num_row_groups))
    return max(
        (group.column(number).total_uncompressed_size for group in groups for number in columns), default=0
    )


def _values(column: Any) -> list[object]:
    """The values of a part of a column; the same object where the file has the same entry of its dictionary."""
    import pyarrow

    if not isinstance(column, pyarrow.DictionaryArray):
        return list(column.to_pylist())
    entries = column.dictionary  # of all rows stored together, of which this part needs a few
    used = {
        index: entries[index].as_py() for index in column.indices.unique().to_pylist() if index is not None
    }
    return [used.get(index) for index in column.indices.to_pylist()]
