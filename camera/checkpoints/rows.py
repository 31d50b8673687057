"""Matrices read by ranges of rows, into memory and not through a map of their file.

Of a map every page that was touched counts as memory of the process until the map is closed, and a matrix of 1.3 GB is
touched whole when it is packed.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Protocol

import torch

from camera.checkpoints.safetensors_file import TensorInfo
from camera.errors import CameraError
from camera.held import opened

CHUNK_BYTES = 8 << 20
"""So much of a tensor is read at once where it does not matter which rows that is."""
_AT_ONCE_BYTES = 16 << 20
"""Most that is read in one call for a few rows in it."""
_GAP_BYTES = 32 << 10
"""Rows with less between them are read together: a call costs as much as reading so much."""


class Rows(Protocol):
    """A matrix [rows, row_length] of which `matrix[start:stop]` gives some rows: a tensor in memory, or one in a file."""

    @property
    def shape(self) -> Sequence[int]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def __getitem__(self, rows: slice, /) -> torch.Tensor: ...


@dataclass(frozen=True)
class StoredRows:
    """A vector or matrix of a safetensors file; threads may read from it side by side."""

    path: Path
    name: str
    info: TensorInfo

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.info.dtype

    def __getitem__(self, rows: slice) -> torch.Tensor:
        """Rows (of a vector: elements) `start:stop`, in memory of their own.

        Raises:
            CameraError: if the file cannot be read, or ends before they do.
        """
        start, stop, step = rows.indices(self.shape[0])
        if step != 1:
            raise ValueError(f"{self.name} is read by ranges of rows, not by every {step}th row")
        count = max(0, stop - start)
        found = torch.empty((count, *self.shape[1:]), dtype=self.dtype)
        if found.numel():
            with self._file() as file:
                self._fill(file, found.reshape(-1).view(torch.uint8), start * (found.nbytes // count))
        return found

    def pick(self, rows_N: torch.Tensor) -> torch.Tensor:
        """Some rows of a matrix, [N, C] in memory of their own; neighbouring ones are read together.

        Args:
            rows_N: int64, ascending.

        Raises:
            CameraError: if the file cannot be read, or ends before a row does.
        """
        width = self.info.size_bytes // self.shape[0]
        found_NB = torch.empty(len(rows_N), width, dtype=torch.uint8)
        with self._file() as file:
            for start, stop in _runs(rows_N.tolist(), width):
                first, last = int(rows_N[start]), int(rows_N[stop - 1])
                count = last - first + 1
                dense = count == stop - start
                span_RB = found_NB[start:stop] if dense else torch.empty(count, width, dtype=torch.uint8)
                self._fill(file, span_RB.view(-1), first * width)
                if not dense:
                    found_NB[start:stop] = span_RB[rows_N[start:stop] - first]
        return found_NB.view(self.dtype)

    def chunks(self) -> Iterator[torch.Tensor]:
        """The bytes, uint8 [up to `CHUNK_BYTES`] at a time, in one buffer that is filled again and again.

        Raises:
            CameraError: if the file cannot be read, or ends before the tensor does.
        """
        size = self.info.size_bytes
        buffer = torch.empty(min(CHUNK_BYTES, size), dtype=torch.uint8)
        with self._file() as file:
            for start in range(0, size, CHUNK_BYTES):
                chunk = buffer[: size - start]
                self._fill(file, chunk, start)
                yield chunk

    @contextmanager
    def _file(self) -> Iterator[BufferedReader]:
        try:
            with opened(self.path, buffering=0) as file:
                yield file
        except OSError as error:
            raise CameraError(f"{self.path} cannot be read ({self.name}): {error}") from None

    def _fill(self, file: BufferedReader, target_B: torch.Tensor, start: int) -> None:
        """Read bytes from `start` in the tensor on."""
        left = target_B.numpy().data
        file.seek(self.info.offset + start)
        while left:
            if not (got := file.readinto(left)):
                raise CameraError(f"{self.path} ends within {self.name}: it was truncated")
            left = left[got:]


def _runs(rows: list[int], width: int) -> Iterator[tuple[int, int]]:
    """First and behind the last of the rows that are read in one call."""
    most, near = _AT_ONCE_BYTES // width, max(1, _GAP_BYTES // width)
    start = 0
    for number in range(1, len(rows)):
        if rows[number] - rows[number - 1] > near or rows[number] - rows[start] >= most:
            yield start, number
            start = number
    if rows:
        yield start, len(rows)
