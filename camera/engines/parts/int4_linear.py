"""Linear layers on 4-bit blocks, one for each kind of device, with the kernels that torch and torch_npu have.

A block is a group of 32 (Q4_0) or 64 (Q4_0_64) weights of a row with one scale: w = d · (nibble − 8). Every kernel
here takes that mapping as it is, with no zero point, so nothing is quantised a second time; only d is rounded to the
kernel's 16-bit type. Before a kernel is used it is compared once with dequantised weights (`usable`).
"""

import importlib
import logging
from functools import cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from camera.engines.parts.blocks import Blocks, codes_of, scales_of
from camera.formats.blocks import dequantize, quantize
from camera.formats.types.q4_0 import Q4_0
from camera.options import BlockType
from camera.registry import BLOCK_FORMATS

log = logging.getLogger(__name__)

INT4_TYPES = tuple(name for name, form in BLOCK_FORMATS.items() if isinstance(form, Q4_0))
"""The block types that these layers take."""
_KERNEL_TOKENS = 64
"""On the CPU the 4-bit kernel serves up to so many tokens; more are faster through dequantised rows."""
_FRACTAL_NZ = 29
"""torch_npu's number of the tiled matrix layout that its int4 kernels are fastest on."""


class Int4Linear(nn.Module):
    """x @ W.T + bias, with W in 4 bits and x in `dtype`."""

    dtype: ClassVar[torch.dtype]
    """What activations must be."""
    kernel: ClassVar[str]
    """The operator, for people who read a report."""
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
        raise NotImplementedError

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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y_MN = self.matmul(x.reshape(-1, self.in_features))
        if self.bias is not None:
            y_MN = y_MN + self.bias
        return y_MN.view(*x.shape[:-1], self.out_features)

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

    def __init__(self, blocks: Blocks, bias: torch.Tensor | None, device: torch.device) -> None:
        super().__init__(blocks, bias, device)
        self.blocks = blocks

    @classmethod
    def why_not(cls, rows: int, columns: int, group: int) -> str | None:
        return None if rows % 16 == 0 else f"{rows} rows are no multiple of 16"

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

    @classmethod
    def why_not(cls, rows: int, columns: int, group: int) -> str | None:
        if rows % 8:
            return f"{rows} rows are no multiple of 8"
        return None if columns % 32 == 0 else f"{columns} columns are no multiple of 32"

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


class NpuInt4Linear(Int4Linear):
    """torch_npu's `npu_weight_quant_batchmatmul`, float16: bfloat16 would round the scales eight times coarser.

    Weights are [K, N], packed along N, in the plain layout.
    """

    dtype = torch.float16
    kernel = "npu_weight_quant_batchmatmul"
    rows_along: ClassVar[dict[str, int]] = {"packed": 1, "scales": 1}
    limit: ClassVar[int] = 65535

    @classmethod
    def why_not(cls, rows: int, columns: int, group: int) -> str | None:
        if max(rows, columns) > cls.limit:
            return f"{max(rows, columns)} rows or columns are more than {cls.limit}"
        if rows % 64:
            return f"{rows} rows are no multiple of 64"
        return None if group < columns else f"a group of {group} is a whole row of {columns}"

    def pack(self, stored: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        # What `npu_convert_weight_to_int4pack` makes of int32 [K, N], bit for bit, from an eighth of the bytes: eight
        # weights of a column in an int32, the first in the lowest bits, as two's complements of four bits.
        signed_KN = codes_of(stored).t().contiguous() ^ 8
        packed = (signed_KN[:, ::2] | signed_KN[:, 1::2] << 4).view(torch.int32)
        return packed.to(device), scales_of(stored).t().contiguous().to(device)

    def matmul(self, x_MK: torch.Tensor) -> torch.Tensor:
        torch_npu = importlib.import_module("torch_npu")
        product_MN: torch.Tensor = torch_npu.npu_weight_quant_batchmatmul(
            x_MK, self.packed, self.scales, antiquant_group_size=self.group
        )
        return product_MN


class TiledNpuInt4Linear(NpuInt4Linear):
    """The same, in the tiled layout (FRACTAL_NZ) that is fastest; only groups of 64 or 128 are eligible."""

    kernel = "npu_weight_quant_batchmatmul, FRACTAL_NZ"

    @classmethod
    def why_not(cls, rows: int, columns: int, group: int) -> str | None:
        if group not in (64, 128):
            return f"the tiled layout takes groups of 64 or 128, not {group}"
        return super().why_not(rows, columns, group)

    def _repacked(self, blocks: Blocks, device: torch.device) -> dict[str, torch.Tensor]:
        found = super()._repacked(blocks, device)
        found["packed"] = importlib.import_module("torch_npu").npu_format_cast(found["packed"], _FRACTAL_NZ)
        return found


KERNELS: dict[str, tuple[type[Int4Linear], ...]] = {
    "cpu": (CpuInt4Linear,),
    "cuda": (CudaInt4Linear,),
    "npu": (TiledNpuInt4Linear, NpuInt4Linear),
}
"""The 4-bit linear layers of each kind of device, best first."""


def int4_linear(blocks: Blocks, bias: torch.Tensor | None, device: torch.device) -> Int4Linear | str:
    """The best 4-bit linear layer on the device, or why it must be a 16-bit one."""
    reasons = []
    for kind in KERNELS[device.type]:
        reason = kind.why_not(blocks.rows, blocks.columns, blocks.group)
        reason = reason or usable(kind, device, blocks.type)  # type: ignore[arg-type] # a class is hashable
        if reason is None:
            return kind(blocks, bias, device)
        reasons.append(reason)
    return "; ".join(reasons)


@cache
def usable(kind: type[Int4Linear], device: torch.device, block_type: BlockType) -> str | None:
    """Try a kernel once on a small random matrix against dequantised weights.

    Returns:
        None if they agree within the rounding of the kernel's dtype, else what went wrong, which is logged too.
    """
    rows, columns = 128, 512
    random = torch.Generator().manual_seed(0)
    data = quantize(torch.randn((rows, columns), generator=random), block_type)
    blocks = Blocks(block_type, data)
    x_MK = torch.randn((4, columns), generator=random).to(kind.dtype)
    exact_MN = F.linear(x_MK.float(), torch.from_numpy(dequantize(data, block_type, columns)))
    try:
        found_MN = kind(blocks, None, device)(x_MK.to(device)).float().cpu()
    except (RuntimeError, NotImplementedError, AttributeError, ImportError, TypeError) as error:
        reason = f"{kind.kernel} failed on {device}: {error}"
    else:
        # Each term may be off by the rounding of its scale and the sum by the rounding of the result.
        error_ratio = float((found_MN - exact_MN).norm() / exact_MN.norm())
        if error_ratio <= 4 * torch.finfo(kind.dtype).eps:
            return None
        reason = f"{kind.kernel} on {device} is off by {error_ratio:.1%} against dequantised weights"
    log.warning("%s is not used for %s: %s", kind.kernel, block_type, reason)
    return reason
