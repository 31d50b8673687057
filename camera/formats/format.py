"""What a block format is: its bytes, and how numbers become blocks and come back.

A row is stored alone, as whole blocks of consecutive weights. A format is one module of `camera.formats.types`, which
registers it; all that is known of it stands there.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from camera.formats.parallel import Scratch

FP16_OVERFLOW = 65520
"""The smallest number that fp16 rounds to infinity."""


@dataclass(frozen=True)
class Marker:
    """Tells a GGUF file's own use of a type number that stock files use for another type."""

    key: str
    value: str
    """How a block lies."""
    stock: str
    """What stock files mean by the number."""


@dataclass(frozen=True)
class Encoded:
    """Rows as blocks, on the device that packed them."""

    data: torch.Tensor
    """uint8 [blocks, block_bytes]."""
    numbers: torch.Tensor
    """float32 [blocks, block_length]: what the bytes stand for."""
    fits: torch.Tensor
    """bool []: False if some value does not fit, and then the rest means nothing."""


class BlockFormat(ABC):
    """A type that matrices are stored as, and the numbers by which GGUF knows it."""

    name: ClassVar[str]
    block_length: ClassVar[int]
    """Weights in a block; a row's length is a multiple of it."""
    block_bytes: ClassVar[int]
    tensor_number: ClassVar[int]
    """`ggml_type` of a tensor."""
    file_number: ClassVar[int]
    """`general.file_type` of a file whose matrices are of this type."""
    fallback: ClassVar[str | None] = None
    """The type of a matrix whose rows are no multiple of the block."""
    in_mixtures: ClassVar[bool] = False
    """Whether `target_bpw` mixes this type with finer ones."""
    marker: ClassVar[Marker | None] = None
    """What a GGUF file must say for its tensors to be read as this type; None for stock types."""

    @abstractmethod
    def encode(self, chunk: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> bool:
        """Numbers to bytes.

        What bounds it is the number of passes over the chunk: each costs about 0.1 ns a weight. So every pass is an
        operation that torch or numpy vectorises, into memory that was there before.

        Args:
            chunk: whole rows, contiguous, on the CPU, of any floating dtype.
            out: uint8 [blocks, block_bytes], to write to.
            scratch: of the thread.

        Returns:
            False if some value does not fit.
        """

    @abstractmethod
    def decode(self, stored: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
        """Bytes to numbers.

        Args:
            stored: uint8 [blocks, block_bytes], contiguous.
            out: float32 [blocks, block_length], to write to.
            scratch: of the thread.
        """

    def encode_and_decode(
        self, chunk: torch.Tensor, out: torch.Tensor, numbers: torch.Tensor, scratch: Scratch
    ) -> bool:
        """`encode`, and what the bytes stand for to `numbers`, float32 [blocks, block_length]. A type that has its codes at
        hand need not look for them in the bytes again."""
        if not self.encode(chunk, out, scratch):
            return False
        self.decode(out, numbers, scratch)
        return True

    def encode_on_device(self, chunk: torch.Tensor) -> Encoded:
        """The bytes of `encode` by torch's operations alone, on whatever device the numbers are; none waits for it. A type
        that does not have it is packed on the CPU.

        Args:
            chunk: whole rows, contiguous, of any floating dtype.
        """
        raise NotImplementedError(f"{self.name} has no such operations")

    def row_bytes(self, row_length: int) -> int:
        """Bytes of a row of `row_length` weights."""
        return row_length // self.block_length * self.block_bytes

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block_length


def to_float32(chunk: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """The chunk itself, or its float32 copy in scratch memory."""
    if chunk.dtype == torch.float32:
        return chunk
    return scratch.take("float32", tuple(chunk.shape), torch.float32).copy_(chunk)


def store_scale(scale: torch.Tensor, out: torch.Tensor) -> bool:
    """Write the scales as fp16 to the first two bytes of each block; False if one is NaN, infinity or too large."""
    out[:, :2].view(torch.float16)[:, 0].copy_(scale)
    lowest, highest = scale.aminmax()
    return float(lowest) > -FP16_OVERFLOW and float(highest) < FP16_OVERFLOW


def stored_scales(blocks: torch.Tensor) -> torch.Tensor:
    """What `store_scale` wrote: float32 [blocks, 1]."""
    return blocks[:, :2].view(torch.float16).float()


def inverse_scale(scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """1 / scale with 0 where that is infinite, and the places where it is: of a scale of zero, or one so small that
    fp16 holds it as zero."""
    inverse = scale.reciprocal()
    lowest, highest = inverse.aminmax()
    if -math.inf < float(lowest) and float(highest) < math.inf:
        return inverse, torch.empty(0, dtype=torch.int64)
    infinite = torch.nonzero(inverse.isinf()).squeeze(1)
    inverse[infinite] = 0
    return inverse, infinite
