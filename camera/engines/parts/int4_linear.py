"""Linear layers on 4-bit blocks, one for each kind of device, with the kernels that torch and torch_npu have.

A block is a group of 32 (Q4_0) or 64 (Q4_0_64) weights of a row with one scale: w = d · (nibble − 8). Every kernel
here takes that mapping as it is, with no zero point, so nothing is quantised a second time; only d is rounded to the
kernel's 16-bit type. Before a kernel is used it is compared once with dequantised weights (`usable`).
"""

import importlib
import logging
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from camera.formats.blocks import dequantize, quantize
from camera.formats.types.q4_0 import Q4_0
from camera.options import BlockType
from camera.registry import BLOCK_FORMATS

log = logging.getLogger(__name__)

INT4_TYPES = tuple(name for name, form in BLOCK_FORMATS.items() if isinstance(form, Q4_0))
"""The block types that these layers take."""
_ROWS_AT_ONCE = 4096
"""Rows of a matrix unpacked at once; a whole output head would take gigabytes as int32."""
_KERNEL_TOKENS = 64
"""On the CPU the 4-bit kernel serves up to so many tokens; more are faster through dequantised rows."""
_FRACTAL_NZ = 29
"""torch_npu's number of the tiled matrix layout that its int4 kernels are fastest on."""


@dataclass(frozen=True)
class Blocks:
    """The 4-bit blocks of one matrix, as a GGUF stores them."""

    type: BlockType
    """`q4_0` or `q4_0_64`."""
    data: np.ndarray
    """uint8 [N, bytes per row]; a memory map costs no memory until it is read."""

    @property
    def group(self) -> int:
        return BLOCK_FORMATS[self.type].block_length

    @property
    def rows(self) -> int:
        """N: output features."""
        return int(self.data.shape[0])

    @property
    def columns(self) -> int:
        """K: input features."""
        return int(self.data.shape[1]) // BLOCK_FORMATS[self.type].block_bytes * self.group

    def part(self, start: int, stop: int) -> "Blocks":
        """Some of the rows."""
        return Blocks(self.type, self.data[start:stop])

    def parts(self) -> list["Blocks"]:
        """All rows, in pieces that are small enough to unpack."""
        return [self.part(start, start + _ROWS_AT_ONCE) for start in range(0, self.rows, _ROWS_AT_ONCE)]

    def nibbles(self) -> torch.Tensor:
        """uint8 [N, K], 0 to 15, of which 8 stands for zero."""
        return torch.from_numpy(self._form.split(self.data)[0])

    def scales(self) -> torch.Tensor:
        """float16 [N, K / group]."""
        return torch.from_numpy(self._form.split(self.data)[1])

    def dequantize(self) -> torch.Tensor:
        """float32 [N, K]."""
        return torch.from_numpy(dequantize(self.data, self.type, self.columns))

    @property
    def _form(self) -> Q4_0:
        form = BLOCK_FORMATS[self.type]
        assert isinstance(form, Q4_0)
        return form


class Int4Linear(nn.Module):
    """x @ W.T + bias, with W in 4 bits and x in `dtype`."""

    dtype: ClassVar[torch.dtype]
    """What activations must be."""
    kernel: ClassVar[str]
    """The operator, for people who read a report."""
    packed: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, blocks: Blocks, bias: torch.Tensor | None, device: torch.device) -> None:
        """Repack the blocks for the kernel, on the device. bias: [N] or None."""
        super().__init__()
        self.in_features, self.out_features, self.group = blocks.columns, blocks.rows, blocks.group
        packed, scales = self.pack(blocks, device)
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.to(device, self.dtype), persistent=False)

    @classmethod
    def why_not(cls, rows: int, columns: int, group: int) -> str | None:
        """None if the kernel takes a matrix [rows, columns] in groups, else the rule it breaks."""
        raise NotImplementedError

    def pack(self, blocks: Blocks, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights and the scales as the kernel wants them."""
        raise NotImplementedError

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


def _scales_and_zeros(blocks: Blocks, device: torch.device) -> torch.Tensor:
    """bfloat16 [K / group, N, 2] of (scale, 0): what torch's int4pack kernels read."""
    scales = blocks.scales().t().to(device, torch.bfloat16)
    return torch.stack((scales, torch.zeros_like(scales)), dim=-1).contiguous()


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

    def pack(self, blocks: Blocks, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        packed = [
            torch.ops.aten._convert_weight_to_int4pack_for_cpu(part.nibbles().to(torch.int32), 1)
            for part in blocks.parts()
        ]
        return torch.cat(packed), _scales_and_zeros(blocks, device)

    def matmul(self, x_MK: torch.Tensor) -> torch.Tensor:
        if x_MK.shape[0] <= _KERNEL_TOKENS:
            multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
            product_MN: torch.Tensor = multiply(x_MK, self.packed, self.group, self.scales)
            return product_MN
        x32_MK = x_MK.float()
        return torch.cat(
            [F.linear(x32_MK, part.dequantize()).to(x_MK.dtype) for part in self.blocks.parts()], dim=1
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

    def pack(self, blocks: Blocks, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        inner_tiles = next(tiles for tiles in (8, 4, 2) if blocks.columns % (16 * tiles) == 0)
        packed = []
        for part in blocks.parts():
            nibbles = part.nibbles().to(device)
            # Two weights to a byte, the one of the even column in the high half.
            pairs = (nibbles[:, ::2] << 4 | nibbles[:, 1::2]).contiguous()
            packed.append(torch.ops.aten._convert_weight_to_int4pack(pairs, inner_tiles))
        return torch.cat(packed), _scales_and_zeros(blocks, device)

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
    limit: ClassVar[int] = 65535

    @classmethod
    def why_not(cls, rows: int, columns: int, group: int) -> str | None:
        if max(rows, columns) > cls.limit:
            return f"{max(rows, columns)} rows or columns are more than {cls.limit}"
        if rows % 64:
            return f"{rows} rows are no multiple of 64"
        return None if group < columns else f"a group of {group} is a whole row of {columns}"

    def pack(self, blocks: Blocks, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        torch_npu = importlib.import_module("torch_npu")
        signed_KN = (blocks.nibbles().to(torch.int32) - 8).t().contiguous().to(device)
        packed = torch_npu.npu_convert_weight_to_int4pack(signed_KN)
        return packed, blocks.scales().t().contiguous().to(device)

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

    def pack(self, blocks: Blocks, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        packed, scales = super().pack(blocks, device)
        return importlib.import_module("torch_npu").npu_format_cast(packed, _FRACTAL_NZ), scales


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
    exact_MN = F.linear(x_MK.float(), blocks.dequantize())
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
