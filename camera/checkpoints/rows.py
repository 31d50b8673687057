"""Matrices read by ranges of rows, into memory and not through a map of their file.

Of a map every page that was touched counts as memory of the process until the map is closed, and a matrix of 1.3 GB is
touched whole when it is packed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from camera.checkpoints.safetensors_file import TensorInfo
from camera.errors import CameraError


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
            offset = self.info.offset + start * (found.nbytes // count)
            self._read_into(found.reshape(-1).view(torch.uint8).numpy(), offset)
        return found

    def _read_into(self, out: np.ndarray, offset: int) -> None:
        left = out.data
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(offset)
                while left:
                    if not (got := file.readinto(left)):
                        raise CameraError(f"{self.path} ends within {self.name}: it was truncated")
                    left = left[got:]
        except OSError as error:
            raise CameraError(f"{self.path} cannot be read ({self.name}): {error}") from None
