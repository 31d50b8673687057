"""Linear layers on 4-bit blocks with the kernels that torch has; torch_npu's are in `int4_npu`.

A block is a group of 32 (Q4_0) or 64 (Q4_0_64) weights of a row with one scale: w = d · (nibble − 8). Every kernel
here takes that mapping as it is, with no zero point, so nothing is quantised a second time; only d is rounded to the
kernel's 16-bit type. Which one is used is chosen in `int4_choice`.
"""

import copy
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import nn

from camera.engines.parts.blocks import Blocks, codes_of, scales_of
from camera.formats.types.q4_0 import Q4_0
from camera.registry import BLOCK_FORMATS

INT4_TYPES = tuple(name for name, form in BLOCK_FORMATS.items() if isinstance(form, Q4_0))
"""The block types that these layers take."""
_KERNEL_TOKENS = 64
"""On the CPU the 4-bit kernel serves up to so many tokens; more are faster through dequantised rows."""
_SINGLE_TOKENS, _ROWS_AT_ONCE = 8, 4096
"""The compiled product takes so many tokens, one by one; more are multiplied with so many dequantised rows at once."""


class Int4Linear(nn.Module):
    """x @ W.T + bias, with W in 4 bits and x in `dtype`."""

    dtype: ClassVar[torch.dtype]
    """What activations must be."""
    kernel: str
    """The operator, for people who read a report."""
    challenges: ClassVar[bool] = False
    """Whether it is used only where it is timed as clearly faster than the first kernel that needs no trial."""
    rows_multiple: ClassVar[int] = 1
    """The kernel's tiles take so many rows: a matrix must have a multiple of them."""
    rows_limit: ClassVar[int] = sys.maxsize
    """The most rows that the kernel takes."""
    rows_along: ClassVar[dict[str, int]] = {"packed": 0, "scales": 1}
    """The buffers, and the dimension of each along which the matrix's rows lie."""
    packed: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, blocks: Blocks, bias: torch.Tensor | None, device: torch.device) -> None:
        """Repack the blocks for the kernel, on the device. bias: [N] or None."""
        super().__init__()
        self.in_features, self.out_features, self.group = blocks.columns, blocks.rows, blocks.group
        for name, tensor in self._repacked(blocks, device).items():
            self.register_buffer(name, tensor, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.to(device, self.dtype), persistent=False)

    @classmethod
    def why_not(cls, rows: int, columns: int, group: int) -> str | None:
        """None if the kernel takes a matrix [rows, columns] in groups, else the rule it breaks."""
        if rows > cls.rows_limit:
            return f"{rows} rows are more than {cls.rows_limit}"
        return f"{rows} rows are no multiple of {cls.rows_multiple}" if rows % cls.rows_multiple else None

    def pack(self, stored: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights and the scales of some rows as the kernel wants them, on the device.

        Args:
            stored: uint8 [rows, K / group, bytes of a block]; a multiple of 64 rows, or the last ones.
            device: of the layer.
        """
        raise NotImplementedError

    def _repacked(self, blocks: Blocks, device: torch.device) -> dict[str, torch.Tensor]:
        """Both for all rows, made piece by piece."""
        found: dict[str, torch.Tensor] = {}
        for start, stored in blocks.pieces():
            parts = self.pack(stored, device)
            for (name, along), part in zip(self.rows_along.items(), parts, strict=True):
                size = part.shape[along]
                if start == 0:
                    shape = list(part.shape)
                    shape[along] = size * blocks.rows // len(stored)
                    found[name] = torch.empty(shape, dtype=part.dtype, device=device)
                found[name].narrow(along, start * size // len(stored), size).copy_(part)
        return found

    def matmul(self, x_MK: torch.Tensor) -> torch.Tensor:
        """x @ W.T, [M, N]."""
        raise NotImplementedError

    def linear(self, x_MK: torch.Tensor) -> torch.Tensor:
        """x @ W.T + bias, [M, N]."""
        y_MN = self.matmul(x_MK)
        return y_MN if self.bias is None else y_MN + self.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)

    def twin(self) -> Self:
        """The same layer on weights of its own."""
        other = copy.copy(self)
        other._buffers = {
            name: None if buffer is None else self._copy_of(buffer) for name, buffer in self._buffers.items()
        }
        return other

    def _copy_of(self, buffer: torch.Tensor) -> torch.Tensor:
        return buffer.clone()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, group={self.group}, kernel={self.kernel}"


def _scales_and_zeros(stored: torch.Tensor) -> torch.Tensor:
    """bfloat16 [K / group, N, 2] of (scale, 0): what torch's int4pack kernels read."""
    scales = scales_of(stored).t().to(torch.bfloat16)
    return torch.stack((scales, torch.zeros_like(scales)), dim=-1)


class CpuInt4Linear(Int4Linear):
    """torch's `_weight_int4pack_mm_for_cpu`, bfloat16.

    Longer prompts go through rows dequantised on the fly from the blocks themselves, in float32: the packed layout
    cannot be read back, and a second copy of the weights would cost what 4 bits save. The blocks are a memory map.
    """

    dtype = torch.bfloat16
    kernel = "aten::_weight_int4pack_mm_for_cpu"
    rows_multiple = 16

    def __init__(self, blocks: Blocks, bias: torch.Tensor | None, device: torch.device) -> None:
        super().__init__(blocks, bias, device)
        self.blocks = blocks

    def pack(self, stored: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        nibbles, (rows, groups, _) = stored[..., 2:], stored.shape
        codes = torch.empty((rows, groups, 2, self.group // 2), dtype=torch.int32)
        torch.bitwise_and(nibbles, 15, out=codes[:, :, 0])
        torch.bitwise_right_shift(nibbles, 4, out=codes[:, :, 1])
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.view(rows, -1), 1)
        return packed, _scales_and_zeros(stored)

    def matmul(self, x_MK: torch.Tensor) -> torch.Tensor:
        if x_MK.shape[0] <= _KERNEL_TOKENS:
            multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
            product_MN: torch.Tensor = multiply(x_MK, self.packed, self.group, self.scales)
            return product_MN
        x32_MK = x_MK.float()
        return torch.cat(
            [F.linear(x32_MK, part_NK).to(x_MK.dtype) for _, part_NK in self.blocks.dequantized()], dim=1
        )


class CudaInt4Linear(Int4Linear):
    """torch's `_weight_int4pack_mm` (tinygemm), bfloat16."""

    dtype = torch.bfloat16
    kernel = "aten::_weight_int4pack_mm"
    rows_multiple = 8

    @classmethod
    def why_not(cls, rows: int, columns: int, group: int) -> str | None:
        if columns % 32:
            return f"{columns} columns are no multiple of 32"
        return super().why_not(rows, columns, group)

    def pack(self, stored: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        stored = stored.to(device)  # the fewest bytes that can cross the bus
        inner_tiles = next(tiles for tiles in (8, 4, 2) if self.in_features % (16 * tiles) == 0)
        codes = codes_of(stored)
        # Two weights to a byte, the one of the even column in the high half.
        pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()
        return torch.ops.aten._convert_weight_to_int4pack(pairs, inner_tiles), _scales_and_zeros(stored)

    def matmul(self, x_MK: torch.Tensor) -> torch.Tensor:
        multiply = torch.ops.aten._weight_int4pack_mm
        product_MN: torch.Tensor = multiply(x_MK, self.packed, self.group, self.scales)
        return product_MN


class BlockwiseInt4Linear(Int4Linear):
    """The file's own nibbles and scales, multiplied by what torch.compile makes of three lines of torch.

    A token moves the bytes of the file and no more, where tinygemm reads scales with zero points; whether a compiled
    reduction moves them faster than a kernel made for it, only a trial on the device can tell.
    """

    dtype = torch.bfloat16
    kernel = "compiled product of blocks"
    challenges = True

    rows_along: ClassVar[dict[str, int]] = {"packed": 0, "scales": 0}

    def pack(self, stored: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        stored = stored.to(device)
        return stored[..., 2:].contiguous(), scales_of(stored)

    def matmul(self, x_MK: torch.Tensor) -> torch.Tensor:
        if len(x_MK) > _SINGLE_TOKENS:
            rows = range(0, self.out_features, _ROWS_AT_ONCE)
            parts = [slice(start, start + _ROWS_AT_ONCE) for start in rows]
            return torch.cat([F.linear(x_MK, self._weights(part)) for part in parts], dim=1)
        product = _compiled_product() if x_MK.is_cuda else blockwise_product
        return torch.stack([product(x_K, self.packed, self.scales) for x_K in x_MK]).to(x_MK.dtype)

    def _weights(self, rows: slice) -> torch.Tensor:
        """Some rows dequantised, [rows, K]."""
        nibbles, scales = self.packed[rows], self.scales[rows]
        codes = torch.cat((nibbles & 15, nibbles >> 4), dim=-1).to(self.dtype) - 8
        return (codes * scales[..., None].to(self.dtype)).flatten(1)


def blockwise_product(x_K: torch.Tensor, nibbles_NGH: torch.Tensor, scales_NG: torch.Tensor) -> torch.Tensor:
    """W @ x in float32, [N], of blocks: the low nibbles of a block's H bytes are its first half, the high ones the second."""
    x_G2H = x_K.float().view(scales_NG.shape[1], 2, -1)
    low_NGH, high_NGH = (nibbles_NGH & 15).float() - 8, (nibbles_NGH >> 4).float() - 8
    products_NGH = low_NGH * x_G2H[:, 0] + high_NGH * x_G2H[:, 1]
    return (products_NGH * scales_NG[..., None].float()).sum((1, 2))


@cache
def _compiled_product() -> Callable[..., torch.Tensor]:
    """Made when it is first needed: the compiler takes seconds to import."""
    return torch.compile(blockwise_product, dynamic=False, options={"coordinate_descent_tuning": True})


class Int4Parts(nn.Module):
    """A matrix as 4-bit layers one below the other, where it has more rows than a kernel takes or ends within a tile."""

    def __init__(self, parts: Sequence[Int4Linear], rows: int) -> None:
        """Args:
        parts: in the order of their rows.
        rows: of the matrix; the outputs of the parts beyond them are cut off.
        """
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.in_features, self.out_features = parts[0].in_features, rows
        self.kernel = parts[0].kernel + (f" in {len(parts)} parts" if len(parts) > 1 else "")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = [part(x) for part in self.parts]
        joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return joined[..., : self.out_features]


def rows_of_a_part(rows: int, kinds: Iterable[type[Int4Linear]]) -> int:
    """How many rows each part of a matrix has in the fewest equal parts that all of some kernels take; the last may be
    filled up with rows that the matrix lacks."""
    kinds = tuple(kinds)
    multiple = math.lcm(*(kind.rows_multiple for kind in kinds))
    most = min(kind.rows_limit for kind in kinds) // multiple * multiple
    parts = -(-rows // most)
    return -(-rows // (parts * multiple)) * multiple
