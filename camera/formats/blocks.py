"""Numbers to blocks and back, on all of torch's threads: pure functions, for every block format."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from camera.errors import CameraError
from camera.formats.format import to_float32
from camera.formats.parallel import Scratch, map_chunks
from camera.options import BlockType
from camera.registry import BLOCK_FORMATS

T = TypeVar("T")

_CHUNK_WEIGHTS = 1 << 20
"""Weights that a thread works on at once: enough to hide the cost of a call, few enough for the last cache."""
_SAFE_POWER = 1e-20
"""Below it (and at infinity) a float32 sum of squares may have lost some."""


@dataclass(frozen=True)
class Squares:
    """What storing a tensor lost, in sums over its weights."""

    power: float
    """Σ w²."""
    noise: float
    """Σ (stored − w)²."""


def quantize(weight: torch.Tensor, type: BlockType, *, name: str = "the tensor") -> np.ndarray:
    """Numbers to bytes, on all of torch's threads. Peak memory beyond the result is one chunk of rows for each.

    Args:
        weight: [rows, row_length] or [row_length], any floating dtype, on any device.
        type: what to store it as.
        name: of the tensor, for messages.

    Returns:
        uint8 [rows, bytes per row]; a vector is one row.

    Raises:
        CameraError: if the row length is not a multiple of the block, if there is NaN or infinity, or a value
            too large for the type (or for the fp16 scale of its block).
    """
    rows, out = _rows(weight, type, name), _room(weight, type)
    scratch = Scratch()
    _each_chunk(rows, lambda chunk, start: _encode(chunk, start, out, type, scratch, name))
    return out


def quantize_measured(
    weight: torch.Tensor, type: BlockType, *, name: str = "the tensor"
) -> tuple[np.ndarray, Squares]:
    """As `quantize`, and what was lost: measured on each chunk while it is in the cache.

    Raises:
        CameraError: as `quantize`.
    """
    rows, out = _rows(weight, type, name), _room(weight, type)
    scratch = Scratch()

    def work(chunk: torch.Tensor, start: int) -> Squares:
        _encode(chunk, start, out, type, scratch, name)
        return _squares(chunk, out[start : start + len(chunk)], type, scratch)

    return out, _sum(_each_chunk(rows, work))


def measure(weight: torch.Tensor, packed: np.ndarray, type: BlockType) -> Squares:
    """What was lost of a tensor that is stored already.

    Args:
        weight: [rows, row_length] or [row_length], any floating dtype, on any device.
        packed: uint8 [rows, bytes per row], its bytes.
        type: what they are.
    """
    rows, scratch = _rows(weight, type, "the tensor"), Scratch()
    return _sum(
        _each_chunk(
            rows, lambda chunk, start: _squares(chunk, packed[start : start + len(chunk)], type, scratch)
        )
    )


def dequantize(data: np.ndarray, type: BlockType, row_length: int) -> np.ndarray:
    """Bytes to numbers.

    Args:
        data: uint8 [rows, bytes per row].
        type: what they are.
        row_length: weights in a row.

    Returns:
        float32 [rows, row_length].

    Raises:
        CameraError: if so many bytes are not rows of that length.
    """
    form = BLOCK_FORMATS[type]
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != form.row_bytes(row_length):
        raise CameraError(
            f"{data.dtype} {list(data.shape)} is not {type} with rows of {row_length} weights "
            f"({form.row_bytes(row_length)} bytes each)"
        )
    out = np.empty((data.shape[0], row_length), np.float32)
    numbers, scratch = torch.from_numpy(out), Scratch()

    def decode_chunk(chunk: torch.Tensor, start: int) -> None:
        _decode(data[start : start + len(chunk)], type, chunk, scratch)

    _each_chunk(numbers, decode_chunk)
    return out


def _rows(weight: torch.Tensor, type: BlockType, name: str) -> torch.Tensor:
    """The tensor as rows that the type can hold."""
    rows = weight.detach().reshape(1, -1) if weight.dim() == 1 else weight.detach()
    if rows.dim() != 2:
        raise CameraError(f"{name} has {weight.dim()} dimensions: only vectors and matrices are stored")
    length = BLOCK_FORMATS[type].block_length
    if rows.shape[1] % length:
        raise CameraError(
            f"{name} has rows of {rows.shape[1]} weights, which {type} cannot hold: its blocks are {length} long"
        )
    return rows


def _room(weight: torch.Tensor, type: BlockType) -> np.ndarray:
    rows = weight.shape[0] if weight.dim() == 2 else 1
    return np.empty((rows, BLOCK_FORMATS[type].row_bytes(weight.shape[-1])), np.uint8)


def _each_chunk(rows: torch.Tensor, work: Callable[[torch.Tensor, int], T]) -> list[T]:
    """Call `work` with chunks of whole rows and the number of the first, side by side."""
    step = max(1, _CHUNK_WEIGHTS // max(1, rows.shape[1]))
    return map_chunks(lambda start: work(rows[start : start + step], start), range(0, len(rows), step))


def _encode(
    chunk: torch.Tensor, start: int, out: np.ndarray, type: BlockType, scratch: Scratch, name: str
) -> None:
    chunk = chunk.cpu().contiguous()
    part = torch.from_numpy(out[start : start + len(chunk)]).view(-1, BLOCK_FORMATS[type].block_bytes)
    if not BLOCK_FORMATS[type].encode(chunk, part, scratch):
        _explain(chunk, type, name)


def _decode(data: np.ndarray, type: BlockType, out: torch.Tensor, scratch: Scratch) -> None:
    form = BLOCK_FORMATS[type]
    if not data.flags.writeable or not data.flags.c_contiguous:  # torch takes neither as it is
        data = data.copy()
    stored = torch.from_numpy(data).view(-1, form.block_bytes)
    form.decode(stored, out.view(-1, form.block_length), scratch)


def _squares(chunk: torch.Tensor, packed: np.ndarray, type: BlockType, scratch: Scratch) -> Squares:
    original = to_float32(chunk.cpu(), scratch)
    stored = scratch.take("scaled", tuple(chunk.shape), torch.float32)
    power = _sum_of_rows(torch.mul(original, original, out=stored))
    _decode(packed, type, stored, scratch)
    noise = _sum_of_rows(stored.sub_(original).square_())
    if not _SAFE_POWER < power < float("inf"):
        _decode(packed, type, stored, scratch)
        exact = original.double()
        return Squares(float(exact.square().sum()), float((stored - exact).square().sum()))
    return Squares(power, noise)


def _sum_of_rows(squares: torch.Tensor) -> float:
    """Rows in float32, whose errors are far below the six digits that are kept and differ in sign; their sum in float64."""
    return float(squares.sum(-1).double().sum())


def _sum(parts: list[Squares]) -> Squares:
    return Squares(sum(part.power for part in parts), sum(part.noise for part in parts))


def _explain(chunk: torch.Tensor, type: BlockType, name: str) -> None:
    """Raise the CameraError that says why a chunk of rows cannot be stored."""
    if not chunk.isfinite().all():
        raise CameraError(f"{name} holds NaN or infinity: the checkpoint is damaged, or a stage before was")
    raise CameraError(
        f"{name} holds {chunk.abs().max().item():.3g}, too large for {type}: store this tensor as f32 (overrides)"
    )
