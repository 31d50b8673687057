"""Numbers to blocks and back, on all of torch's threads: pure functions, for every block format."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from camera.checkpoints.rows import Rows
from camera.devices import use_device
from camera.errors import CameraError
from camera.formats.format import BlockFormat, to_float32
from camera.formats.on_device import CHUNK_WEIGHTS as DEVICE_CHUNK_WEIGHTS
from camera.formats.on_device import packs_like_the_cpu, send
from camera.formats.parallel import Scratch, map_chunks
from camera.options import BlockType
from camera.registry import BLOCK_FORMATS

T = TypeVar("T")

CPU = torch.device("cpu")
Put = Callable[[int, np.ndarray], None]
"""Takes rows of bytes to where they belong; see `store`."""

CHUNK_WEIGHTS = 1 << 20
"""Weights that a thread works on at once: enough to hide the cost of a call, few enough for the last cache."""
_SCRATCH = Scratch()
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
    rows, out = as_rows(weight, type, name), _room(weight, type)
    form = BLOCK_FORMATS[type]

    def work(chunk: torch.Tensor, start: int) -> None:
        chunk = chunk.detach().cpu().contiguous()
        encode(form, chunk, out[start : start + len(chunk)], name=name)

    each_chunk(rows, work)
    return out


def store(
    rows: Rows,
    type: BlockType,
    put: Put,
    *,
    name: str = "the tensor",
    device: torch.device = CPU,
) -> Squares:
    """Numbers to bytes that are put in their place at once: chunks of rows are read, packed, measured and written side by
    side, and peak memory is a few megabytes for each thread, whatever the matrix.

    Args:
        rows: [rows, row_length] or [row_length], any floating dtype, on any device or in a file.
        type: what to store it as.
        put: takes the number of a row and uint8 [rows, bytes per row] from there on, from several threads; the array is
            overwritten afterwards.
        name: of the tensor, for messages.
        device: where to pack; the bytes are the same everywhere.

    Raises:
        CameraError: as `quantize`.
    """
    form, there = BLOCK_FORMATS[type], device.type != "cpu" and packs_like_the_cpu(type, device)

    def work(chunk: torch.Tensor, start: int) -> Squares:
        if there:
            data, squares = _store_on_device(form, chunk.detach(), device, name)
        else:
            data, squares = _store_here(form, chunk.detach().cpu().contiguous(), name)
        put(start, data)
        return squares

    chunk_weights = DEVICE_CHUNK_WEIGHTS if there else CHUNK_WEIGHTS
    return sum_of(each_chunk(as_rows(rows, type, name), work, chunk_weights))


def _store_here(form: BlockFormat, chunk: torch.Tensor, name: str) -> tuple[np.ndarray, Squares]:
    """The bytes of some rows, in scratch memory, and what was lost."""
    packed = _SCRATCH.take("packed", (len(chunk), form.row_bytes(chunk.shape[1])), torch.uint8).numpy()
    stored = _SCRATCH.take("stored", tuple(chunk.shape), torch.float32)
    if chunk.dtype != torch.float64:
        chunk = to_float32(chunk, _SCRATCH)
    encode(form, chunk, packed, stored, name=name)
    return packed, lost(chunk, stored)


def _store_on_device(
    form: BlockFormat, chunk: torch.Tensor, device: torch.device, name: str
) -> tuple[np.ndarray, Squares]:
    """The same, packed and measured on a device."""
    use_device(device)  # here, in one of several threads
    sent = send(chunk, device)
    encoded = form.encode_on_device(sent)
    original, stored = sent.float(), encoded.numbers.view(sent.shape)
    sums_2R = torch.stack((original.square().sum(-1), (stored - original).square().sum(-1))).cpu()
    if not encoded.fits:
        _explain(chunk, form.name, name)
    power, noise = sums_2R.double().sum(-1).tolist()
    exactly = not _SAFE_POWER < power < float("inf")
    squares = lost(chunk.cpu(), stored.cpu()) if exactly else Squares(power, noise)
    return encoded.data.cpu().view(len(chunk), -1).numpy(), squares


def encode(
    form: BlockFormat, chunk: torch.Tensor, out: np.ndarray, stored: torch.Tensor | None = None, *, name: str
) -> None:
    """Whole rows to bytes, on this thread.

    Args:
        form: what to store them as.
        chunk: [rows, row_length], contiguous, on the CPU.
        out: uint8 [rows, bytes per row], to write to.
        stored: float32 [rows, row_length], to write what the bytes stand for to.
        name: of the tensor, for messages.

    Raises:
        CameraError: as `quantize`.
    """
    blocks = torch.from_numpy(out).view(-1, form.block_bytes)
    if stored is None:
        fits = form.encode(chunk, blocks, _SCRATCH)
    else:
        fits = form.encode_and_decode(chunk, blocks, stored.view(-1, form.block_length), _SCRATCH)
    if not fits:
        _explain(chunk, form.name, name)


def lost(chunk: torch.Tensor, stored: torch.Tensor) -> Squares:
    """What storing some rows lost.

    Args:
        chunk: floating [rows, row_length], on the CPU.
        stored: float32, what is stored in their place; overwritten.
    """
    original = to_float32(chunk, _SCRATCH)
    power = _sum_of_rows(
        torch.square(original, out=_SCRATCH.take("scaled", tuple(chunk.shape), torch.float32))
    )
    if not _SAFE_POWER < power < float("inf"):
        exact = original.double()
        return Squares(float(exact.square().sum()), float((stored - exact).square().sum()))
    return Squares(power, _sum_of_rows(stored.sub_(original).square_()))


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

    def work(chunk: torch.Tensor, start: int) -> None:
        decode(data[start : start + len(chunk)], type, chunk)

    each_chunk(torch.from_numpy(out), work)
    return out


def decode(data: np.ndarray, type: BlockType, out: torch.Tensor) -> None:
    """Bytes of whole rows to numbers, on this thread.

    Args:
        data: uint8 [rows, bytes per row].
        type: what they are.
        out: float32 [rows, row_length], to write to.
    """
    form = BLOCK_FORMATS[type]
    if not data.flags.writeable or not data.flags.c_contiguous:  # torch takes neither as it is
        data = data.copy()
    stored = torch.from_numpy(data).view(-1, form.block_bytes)
    form.decode(stored, out.view(-1, form.block_length), _SCRATCH)


def each_chunk(
    rows: Rows, work: Callable[[torch.Tensor, int], T], chunk_weights: int = CHUNK_WEIGHTS
) -> list[T]:
    """Call `work` with chunks of whole rows and the number of the first, side by side."""
    step = max(1, chunk_weights // max(1, rows.shape[1]))
    return map_chunks(lambda start: work(rows[start : start + step], start), range(0, rows.shape[0], step))


def as_rows(matrix: Rows, type: BlockType, name: str) -> Rows:
    """A vector as the one row that it is stored as.

    Raises:
        CameraError: if the type cannot hold such rows.
    """
    rows = matrix[:].reshape(1, -1) if len(matrix.shape) == 1 else matrix
    if len(rows.shape) != 2:
        raise CameraError(f"{name} has {len(rows.shape)} dimensions: only vectors and matrices are stored")
    length = BLOCK_FORMATS[type].block_length
    if rows.shape[1] % length:
        raise CameraError(
            f"{name} has rows of {rows.shape[1]} weights, which {type} cannot hold: its blocks are {length} long"
        )
    return rows


def sum_of(parts: Iterable[Squares]) -> Squares:
    """Of the chunks of a tensor."""
    parts = list(parts)
    return Squares(sum(part.power for part in parts), sum(part.noise for part in parts))


def _room(weight: torch.Tensor, type: BlockType) -> np.ndarray:
    rows = weight.shape[0] if weight.dim() == 2 else 1
    return np.empty((rows, BLOCK_FORMATS[type].row_bytes(weight.shape[-1])), np.uint8)


def _sum_of_rows(squares: torch.Tensor) -> float:
    """Rows in float32, whose errors are far below the six digits that are kept and differ in sign; their sum in float64."""
    return float(squares.sum(-1).double().sum())


def _explain(chunk: torch.Tensor, type: BlockType, name: str) -> None:
    """Raise the CameraError that says why a chunk of rows cannot be stored."""
    if not chunk.isfinite().all():
        raise CameraError(f"{name} holds NaN or infinity: the checkpoint is damaged, or a stage before was")
    raise CameraError(
        f"{name} holds {chunk.abs().max().item():.3g}, too large for {type}: store this tensor as f32 (overrides)"
    )
