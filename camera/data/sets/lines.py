"""Texts and rows of records, line by line, within limits: a stranger's file may be one line of a gigabyte."""

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from camera.errors import CameraError
from camera.escape import one_line
from camera.guarded import Limits, run_guarded
from camera.held import opened
from camera.units import bytes_text, few

MAX_TEXT_BYTES = 1 << 30
"""Of one data set read from files; to tokenise as much as one text takes hundreds of gigabytes of memory."""
BYTES_PER_ROW = 64
"""What a row takes beside its text."""
MAX_ROW_BYTES = 32 << 20
"""Of a line of JSON: objects take more than twenty times as much memory."""
_MAX_UNPACKED_BYTES = 8 << 30
"""Of a copy of a data set, whose rows are read as they are needed; the largest file of C4 has a tenth."""
_CHUNK_BYTES = 8 << 20
_LONGEST_NAME = 80


def lines(file: Path, longest: int = MAX_TEXT_BYTES) -> Iterator[tuple[int, str]]:
    """Numbered lines with their ends. Only a line feed ends a line, as JSON Lines has it.

    Raises:
        CameraError: naming file and line, if it is longer than `longest` bytes or no UTF-8.
    """
    with opened(file) as stored:
        number = 0
        while raw := stored.readline(longest + 1):
            number += 1
            if len(raw) > longest:
                raise CameraError(
                    f"{file}, line {number}: longer than {bytes_text(longest)}, and no longer one is read: "
                    "split what it holds"
                )
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise CameraError(
                    f"{file}, line {number}: not valid UTF-8 ({error}); convert the file"
                ) from None


def refuse_more_than_is_read(path: Path, size: int) -> None:
    """Raise CameraError if texts have more bytes than are read of one data set."""
    if size > MAX_TEXT_BYTES:
        raise CameraError(
            f"{path} holds more text than is read of one data set ({bytes_text(MAX_TEXT_BYTES)}). However few samples are "
            "wanted, they are drawn from all of it, so all is read first: give a part of it, fewer files or rows; "
            "of .txt and .jsonl `head -n 100000 FILE > PART` makes one"
        )


def text_bytes(text: str) -> int:
    """What a row of text counts for: its bytes in UTF-8, and what it takes beside them."""
    return BYTES_PER_ROW + (len(text) if text.isascii() else len(text.encode()))


def no_field(field: str, where: str, names: Sequence[str]) -> CameraError:
    """The error of records without the field; their names are a stranger's and of any length."""
    has = one_line(few([name[:_LONGEST_NAME] for name in names]))
    return CameraError(f"{where}: no field {field!r} (it has {has}); set `field`")


def row(line: str, where: str) -> Any:
    """The JSON value of a line.

    Raises:
        CameraError: if it is none, or has numbers or nesting beyond reason.
    """
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CameraError(f"{where}: not valid JSON ({error})") from None


def text_of(value: object, field: str, where: str) -> str:
    """A value that must be text of characters.

    Raises:
        CameraError: if it is not, or holds half a character (a lone surrogate, which JSON can spell).
    """
    if not isinstance(value, str):
        raise CameraError(f"{where}: {field!r} is {type(value).__name__}, not text; set `field`")
    try:
        value.isascii() or value.encode()
    except UnicodeEncodeError as error:
        raise CameraError(
            f"{where}: {field!r} holds half a character ({value[error.start]!a}), which no tokenizer reads: remove it"
        ) from None
    return value


def refuse_unreasonable_records(file: Path) -> None:
    """Raise CameraError if a file of JSON rows, packed or not, has lines or a size that no data set has.

    A child process looks, since a packed megabyte stands for a gigabyte.
    """
    run_guarded(lambda: _measure(file), str(file), Limits(seconds=30 + 20e-9 * file.stat().st_size))


def _measure(file: Path) -> None:
    total = longest = current = 0
    try:
        with opened(file) as stored, _unpacked(file, stored) as unpacked:
            while chunk := unpacked.read(_CHUNK_BYTES):
                total += len(chunk)
                first = chunk.find(b"\n")
                longest = max(longest, current + (first if first >= 0 else len(chunk)))
                current = current + len(chunk) if first < 0 else len(chunk) - chunk.rfind(b"\n") - 1
                if total > _MAX_UNPACKED_BYTES or longest > 8 * MAX_ROW_BYTES:
                    raise CameraError(
                        f"{file} holds more than a data set does ({bytes_text(total)} and more, "
                        f"{bytes_text(longest)} in one line): look at what it is"
                    )
    except (OSError, EOFError) as error:  # not what its ending says
        raise CameraError(f"{file} cannot be read: {error}") from None


def _unpacked(file: Path, stored: BinaryIO) -> Any:
    return gzip.open(stored) if file.suffix.lower() == ".gz" else stored
