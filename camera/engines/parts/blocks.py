"""The blocks of a matrix as a file stores them, read in pieces that are small enough to repack."""

from collections.abc import Iterator

import numpy as np
import torch

from camera.formats.blocks import dequantize
from camera.mapped import release_pages
from camera.options import BlockType
from camera.registry import BLOCK_FORMATS

_WEIGHTS_AT_ONCE = 4 << 20
"""Of a matrix, unpacked at once: 16 MB as int32, where a whole output head would take gigabytes."""
_ROWS_TOGETHER = 64
"""Pieces have a multiple of so many rows, all but the last: kernels tile rows by up to so many."""


class Blocks:
    """The 4-bit blocks of a matrix, or of several one below the other, which have inputs and type in common."""

    def __init__(self, type: BlockType, *matrices: np.ndarray) -> None:
        """Args:
        type: `q4_0` or `q4_0_64`.
        matrices: uint8 [rows, bytes per row]; a memory map costs no memory until it is read.
        """
        self.type, self.matrices = type, matrices
        self.group = BLOCK_FORMATS[type].block_length
        self.rows = sum(map(len, matrices))
        """N: output features."""
        self.columns = matrices[0].shape[1] // BLOCK_FORMATS[type].block_bytes * self.group
        """K: input features."""

    def part(self, start: int, stop: int) -> "Blocks":
        """Some rows in the same memory, as blocks of their own; those beyond the last are zero."""
        parts, above = [], 0
        for matrix in self.matrices:
            parts.append(matrix[max(start - above, 0) : max(stop - above, 0)])
            above += len(matrix)
        parts.append(np.zeros((max(0, stop - max(start, above)), self.matrices[0].shape[1]), np.uint8))
        return Blocks(self.type, *(part for part in parts if len(part)))

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Some of the rows, copied: uint8 [rows, K / group, bytes of a block]."""
        out = np.empty((stop - start, self.matrices[0].shape[1]), np.uint8)
        above = 0
        for matrix in self.matrices:
            first, last = max(start - above, 0), min(stop - above, len(matrix))
            if first < last:
                out[above + first - start : above + last - start] = matrix[first:last]
                release_pages(matrix[first:last])
            above += len(matrix)
        return torch.from_numpy(out).view(len(out), -1, BLOCK_FORMATS[self.type].block_bytes)

    def pieces(self) -> Iterator[tuple[int, torch.Tensor]]:
        """All rows, in pieces: the number of the first and what `read` gives."""
        tiles = _WEIGHTS_AT_ONCE // (self.columns * _ROWS_TOGETHER)
        step = max(1, tiles) * _ROWS_TOGETHER
        for start in range(0, self.rows, step):
            yield start, self.read(start, min(start + step, self.rows))

    def dequantized(self) -> Iterator[tuple[int, torch.Tensor]]:
        """The same, as float32 [rows, K]."""
        for start, stored in self.pieces():
            numbers = dequantize(stored.flatten(1).numpy(), self.type, self.columns)
            yield start, torch.from_numpy(numbers)


def codes_of(stored: torch.Tensor) -> torch.Tensor:
    """Of rows as `Blocks.read` gives them, the nibbles: uint8 [rows, K], 0 to 15, of which 8 stands for zero."""
    nibbles = stored[..., 2:]
    return torch.cat((nibbles & 15, nibbles >> 4), dim=-1).flatten(1)


def scales_of(stored: torch.Tensor) -> torch.Tensor:
    """The scales of the same: float16 [rows, K / group]."""
    return stored[..., :2].contiguous().view(torch.float16)[..., 0]
