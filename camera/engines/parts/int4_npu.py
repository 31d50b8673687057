"""Linear layers on 4-bit blocks by torch_npu's one operator for them, in the layouts of weights that it reads.

Which layout is right and fastest for a shape, only trials on the card can tell: see `int4_trials`.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar

import torch

from camera.engines.parts.blocks import Blocks, codes_of, scales_of
from camera.engines.parts.int4_linear import Int4Linear

FRACTAL_NZ = 29
"""torch_npu's number of the tiled layout of matrices."""
PRECISE_FROM = 17
"""`inner_precise=1` is offered for fewer tokens than that."""
_TILE_ROWS, _TILE_WORDS = 16, 8
"""A tile of int4 weights: 16 of the inputs, 64 of the outputs, which are 8 words of 32 bits."""


class NpuInt4Linear(Int4Linear):
    """`npu_weight_quant_batchmatmul` in float16: bfloat16 would round the scales eight times coarser.

    Weights are [K, N] in the plain layout, packed along N.
    """

    dtype = torch.float16
    kernel = "npu_weight_quant_batchmatmul"
    rows_multiple, rows_limit = 64, 65_535
    rows_along: ClassVar[dict[str, int]] = {"packed": 1, "scales": 1}

    def __init__(
        self, blocks: Blocks, bias: torch.Tensor | None, device: torch.device, inner_precise: int = 0
    ) -> None:
        """As the base class.

        Args:
            inner_precise: 1 lets the kernel compute faster and less exactly, for up to 16 tokens.

        Raises:
            RuntimeError: if the weights are not in the layout that was asked for.
        """
        super().__init__(blocks, bias, device)
        self.inner_precise = inner_precise
        self.npu_format: str = _torch_npu().get_npu_format(self.packed).name
        """Of the weights, as torch_npu names it: what was made, not what was meant."""
        transposed = "" if self._weight_KN().is_contiguous() else " transposed"
        self.kernel = f"{self.kernel}, {self.npu_format}{transposed}, inner_precise={inner_precise}"

    @classmethod
    def why_not(cls, rows: int, columns: int, group: int) -> str | None:
        if columns > cls.rows_limit:
            return f"{columns} columns are more than {cls.rows_limit}"
        if group >= columns:
            return f"a group of {group} is a whole row of {columns}"
        return super().why_not(rows, columns, group)

    def pack(self, stored: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        # What `npu_convert_weight_to_int4pack` makes of int32 [K, N], bit for bit, from an eighth of the bytes: eight
        # weights of a column in an int32, the first in the lowest bits, as two's complements of four bits.
        packed = _packed_along_the_last(codes_of(stored).t().contiguous())
        return packed.to(device), scales_of(stored).t().contiguous().to(device)

    def linear(self, x_MK: torch.Tensor) -> torch.Tensor:
        y_MN: torch.Tensor = _torch_npu().npu_weight_quant_batchmatmul(
            x_MK,
            self._weight_KN(),
            self._scales_GN(),
            bias=self.bias,
            antiquant_group_size=self.group,
            inner_precise=self.inner_precise if len(x_MK) < PRECISE_FROM else 0,
        )
        return y_MN

    def _weight_KN(self) -> torch.Tensor:
        """int32, of which the packed dimension is an eighth."""
        return self.packed

    def _scales_GN(self) -> torch.Tensor:
        return self.scales


class TransposedNpuInt4Linear(NpuInt4Linear):
    """The same with weights and scales as the file has them, row by row: [N, K] packed along K, read as a transposed view."""

    rows_along: ClassVar[dict[str, int]] = {"packed": 0, "scales": 0}

    def pack(self, stored: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        return _packed_along_the_last(codes_of(stored)).to(device), scales_of(stored).to(device)

    def _weight_KN(self) -> torch.Tensor:
        return self.packed.transpose(-1, -2)

    def _scales_GN(self) -> torch.Tensor:
        return self.scales.transpose(-1, -2)


class TiledNpuInt4Linear(NpuInt4Linear):
    """The same in the tiled layout (FRACTAL_NZ), which takes groups of 64 and 128 alone.

    While one is made the device holds its packed weights twice. Where CANN does not tile packed weights (before 9.1) they
    are tiled as int32 and packed afterwards, which holds them some 26 times.
    """

    @classmethod
    def why_not(cls, rows: int, columns: int, group: int) -> str | None:
        if group not in (64, 128):
            return f"the tiled layout takes groups of 64 or 128, not {group}"
        return super().why_not(rows, columns, group)

    def _repacked(self, blocks: Blocks, device: torch.device) -> dict[str, torch.Tensor]:
        found = super()._repacked(blocks, device)
        with _internal_formats():
            found["packed"] = _tiled(found["packed"])
        layout = _torch_npu().get_npu_format(found["packed"])
        if layout != FRACTAL_NZ:
            raise RuntimeError(f"asked for the tiled layout FRACTAL_NZ, torch_npu made {layout.name}")
        return found

    def _copy_of(self, buffer: torch.Tensor) -> torch.Tensor:
        if _torch_npu().get_npu_format(buffer) != FRACTAL_NZ:
            return super()._copy_of(buffer)
        # A clone would be described as tiles of sixteen words.
        with _internal_formats():
            copied = _tiled(torch.zeros(buffer.shape, dtype=buffer.dtype, device=buffer.device))
        torch.ops.npu.copy_memory_(copied, buffer)
        return copied


LAYOUTS: dict[str, type[NpuInt4Linear]] = {
    "plain": NpuInt4Linear,
    "transposed": TransposedNpuInt4Linear,
    "tiled": TiledNpuInt4Linear,
}
"""The layouts of weights; what needs no trial comes first."""


def _torch_npu() -> Any:
    return importlib.import_module("torch_npu")


def _packed_along_the_last(codes: torch.Tensor) -> torch.Tensor:
    """Nibbles [..., L] in uint8, 0 to 15, as signed ones in int32 [..., L / 8]."""
    signed = codes ^ 8
    return (signed[:, ::2] | signed[:, 1::2] << 4).view(torch.int32)


def _tiled(packed_KN: torch.Tensor) -> torch.Tensor:
    """Packed weights of the plain layout in the tiled one; `_internal_formats` must be on."""
    torch_npu = _torch_npu()
    if _tiles_words(packed_KN.device):
        tiled: torch.Tensor = torch_npu.npu_format_cast(packed_KN, FRACTAL_NZ, customize_dtype=torch.int32)
        return tiled
    shifts = torch.arange(28, -1, -4, dtype=torch.int32, device=packed_KN.device)
    weight_KN = (packed_KN[..., None] << shifts >> 28).flatten(1)  # signed, eight of each word
    weight_KN = torch_npu.npu_format_cast(weight_KN, FRACTAL_NZ)
    packed: torch.Tensor = torch_npu.npu_convert_weight_to_int4pack(weight_KN)
    return packed


@cache
def _tiles_words(device: torch.device) -> bool:
    """Whether CANN makes tiles of eight words when it is asked to, and not of sixteen as for 16-bit numbers."""
    tile = torch.zeros((_TILE_ROWS, _TILE_WORDS), dtype=torch.int32, device=device)
    try:
        tiled = _torch_npu().npu_format_cast(tile, FRACTAL_NZ, customize_dtype=torch.int32)
    except RuntimeError:
        return False
    return bool(tiled.untyped_storage().nbytes() == tile.nbytes)


@contextmanager
def _internal_formats() -> Iterator[None]:
    """Let torch_npu make other layouts than the plain one, which it does not of itself."""
    config: Any = torch.get_device_module("npu").config
    before = _torch_npu()._C._npu_getOption("ALLOW_INTERNAL_FORMAT")  # the public one can only be set
    config.allow_internal_format = True
    try:
        yield
    finally:
        config.allow_internal_format = before == b"enable"
