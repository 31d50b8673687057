"""The types a matrix can be stored as, and their bytes: pure functions between numbers and blocks.

A row is stored alone, as whole blocks of consecutive weights. Sources: ggml's `ggml-quants.c` for Q4_0 and
Q8_0; docs/formats.md for Q4_0_64, a Q4_0 whose block is 64 weights long.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from camera.errors import CameraError
from camera.formats.parallel import map_chunks
from camera.options import BlockType

_CHUNK_WEIGHTS = 1 << 20
"""Weights that a thread works on at once: enough to hide the cost of a call, few enough for the last cache."""
_FP16_OVERFLOW = 65520
"""The smallest number that fp16 rounds to infinity."""


@dataclass(frozen=True)
class BlockFormat:
    """How a type lies in a file, and the numbers by which GGUF knows it."""

    block_length: int
    """Weights in a block; a row's length is a multiple of it."""
    block_bytes: int
    tensor_number: int
    """`ggml_type` of a tensor."""
    file_number: int
    """`general.file_type` of a file whose matrices are of this type."""

    def row_bytes(self, row_length: int) -> int:
        """Bytes of a row of `row_length` weights."""
        return row_length // self.block_length * self.block_bytes

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block_length


FORMATS: dict[BlockType, BlockFormat] = {
    "f32": BlockFormat(1, 4, tensor_number=0, file_number=0),
    "f16": BlockFormat(1, 2, tensor_number=1, file_number=1),
    "bf16": BlockFormat(1, 2, tensor_number=30, file_number=32),
    "q8_0": BlockFormat(32, 34, tensor_number=8, file_number=7),
    "q4_0": BlockFormat(32, 18, tensor_number=2, file_number=2),
    # Upstream has since given both numbers to NVFP4: see docs/formats.md.
    "q4_0_64": BlockFormat(64, 34, tensor_number=40, file_number=39),
}


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
    rows = weight.detach().reshape(1, -1) if weight.dim() == 1 else weight.detach()
    if rows.dim() != 2:
        raise CameraError(f"{name} has {weight.dim()} dimensions: only vectors and matrices are stored")
    row_count, row_length = rows.shape
    form = FORMATS[type]
    if row_length % form.block_length:
        raise CameraError(
            f"{name} has rows of {row_length} weights, which {type} cannot hold: its blocks are "
            f"{form.block_length} long"
        )
    encode = _ENCODERS[type]
    out = np.empty((row_count, form.row_bytes(row_length)), np.uint8)
    step = max(1, _CHUNK_WEIGHTS // max(1, row_length))

    def encode_chunk(start: int) -> None:
        chunk = rows[start : start + step].cpu().contiguous()
        fits = encode(chunk, out[start : start + step].reshape(-1, form.block_bytes))
        if not fits:
            _explain(chunk, type, name)

    map_chunks(encode_chunk, range(0, row_count, step))
    return out


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
    form = FORMATS[type]
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != form.row_bytes(row_length):
        raise CameraError(
            f"{data.dtype} {list(data.shape)} is not {type} with rows of {row_length} weights "
            f"({form.row_bytes(row_length)} bytes each)"
        )
    out = np.empty((data.shape[0], row_length), np.float32)
    step = max(1, _CHUNK_WEIGHTS // max(1, row_length))

    def decode_chunk(start: int) -> None:
        chunk = np.ascontiguousarray(data[start : start + step])
        _DECODERS[type](
            chunk.reshape(-1, form.block_bytes), out[start : start + step].reshape(-1, form.block_length)
        )

    map_chunks(decode_chunk, range(0, data.shape[0], step))
    return out


def twin(data: np.ndarray) -> np.ndarray:
    """The Q4_0 bytes that hold exactly the numbers of Q4_0_64 bytes: each block becomes two with its scale.

    Args:
        data: uint8 [rows, 34 · blocks], Q4_0_64.

    Returns:
        uint8 [rows, 36 · blocks], Q4_0.
    """
    blocks = data.reshape(-1, 34)
    low, high = _nibbles(blocks[:, 2:])  # weights 0..31 and 32..63 of each block
    out = np.empty((blocks.shape[0], 2, 18), np.uint8)
    out[:, :, :2] = blocks[:, None, :2]
    for half, codes in enumerate((low, high)):
        out[:, half, 2:] = codes[:, :16] | codes[:, 16:] << 4
    return out.reshape(data.shape[0], -1)


# Encoders: rows of any floating dtype -> blocks' bytes, written in place; False if some value does not fit.


def _encode_float(chunk: torch.Tensor, out: np.ndarray, dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:  # by way of float32, as ggml goes
        chunk = chunk.float()
    # Rounding keeps the order, so if the extremes stay finite all do; and NaN is its own extreme.
    if not torch.stack(chunk.aminmax()).to(dtype).isfinite().all():
        return False
    torch.from_numpy(out).view(dtype).copy_(chunk.reshape(-1, 1))
    return True


def _encode_q8_0(chunk: torch.Tensor, out: np.ndarray) -> bool:
    blocks = chunk.reshape(-1, 32).float()
    scale = torch.maximum(blocks.amax(-1), blocks.amin(-1).neg_()).abs_() / 127  # abs: no minus zero
    if not _store_scale(scale, out):
        return False
    inverse, _ = _inverse(scale)
    rest = torch.mul(blocks, inverse[:, None]).numpy()
    whole = np.trunc(rest)  # numpy's trunc is fifteen times as fast as torch's
    rest -= whole
    rest *= 2
    np.trunc(rest, out=rest)  # half away from zero; adding 0.5 to a number would round it once too often
    rest += whole
    torch.from_numpy(out)[:, 2:].view(torch.int8).copy_(torch.from_numpy(rest.astype(np.int8)))
    return True


def _encode_q4(chunk: torch.Tensor, out: np.ndarray, length: int) -> bool:
    blocks = chunk.reshape(-1, length).float()
    scale = _signed_extreme(blocks).div_(-8)
    if not _store_scale(scale, out):
        return False
    inverse, infinite = _inverse(scale)
    scaled = torch.mul(blocks, inverse[:, None]).add_(
        8.5
    )  # two roundings, as the reference: never a fused one
    if len(infinite):
        # By a scale too small to invert the reference gets what converts to 0; by zero it gets 8.
        scaled[infinite[scale[infinite] != 0]] = 0
    codes = torch.from_numpy(scaled.numpy().astype(np.uint8))  # numpy converts six times as fast as torch
    codes.clamp_(max=15)  # what is opposite to the largest may come to 16
    # Shifting eight codes at a time is safe: none has more than four bits.
    shifted = (codes.view(torch.int64) << 4).view(torch.uint8)
    half = length // 2
    torch.bitwise_or(codes[:, :half], shifted[:, half:], out=torch.from_numpy(out)[:, 2:])
    return True


def _store_scale(scale: torch.Tensor, out: np.ndarray) -> bool:
    """Write the scales as fp16; False if one is NaN, infinity or too large."""
    torch.from_numpy(out)[:, :2].view(torch.float16)[:, 0].copy_(scale)
    lowest, highest = scale.aminmax()
    return float(lowest) > -_FP16_OVERFLOW and float(highest) < _FP16_OVERFLOW


def _inverse(scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """1 / scale, and where that is infinite: of a scale of zero, or one so small that fp16 holds it as zero. 0 there."""
    inverse = scale.reciprocal()
    lowest, highest = inverse.aminmax()
    if -math.inf < float(lowest) and float(highest) < math.inf:
        return inverse, torch.empty(0, dtype=torch.int64)
    infinite = torch.nonzero(inverse.isinf()).squeeze(1)
    inverse[infinite] = 0
    return inverse, infinite


def _signed_extreme(blocks: torch.Tensor) -> torch.Tensor:
    """Of each block the value of largest magnitude, with its sign; of equals the first. NaN if there is one."""
    highest, lowest = blocks.amax(-1), blocks.amin(-1)
    larger = highest + lowest  # its sign says which has the larger magnitude; zero if neither
    extreme = torch.maximum(highest, lowest.neg_()).copysign_(larger)
    if not larger.all():  # the sign of the first decides, and a search for it is slow: only where it matters
        ties = torch.nonzero(larger == 0).squeeze(1)
        tied = blocks[ties].numpy()
        first = np.abs(tied).argmax(-1)
        extreme[ties] = torch.from_numpy(np.take_along_axis(tied, first[:, None], -1).squeeze(1))
    return extreme


def _explain(chunk: torch.Tensor, type: BlockType, name: str) -> None:
    """Raise the CameraError that says why a chunk of rows cannot be stored."""
    if not chunk.isfinite().all():
        raise CameraError(f"{name} holds NaN or infinity: the checkpoint is damaged, or a stage before was")
    raise CameraError(
        f"{name} holds {chunk.abs().max().item():.3g}, too large for {type}: store this tensor as f32 (overrides)"
    )


# Decoders: blocks' bytes -> float32 blocks, written in place.


def _decode_float(blocks: np.ndarray, out: np.ndarray, dtype: type[np.floating]) -> None:
    out[:] = blocks.view(dtype)


def _decode_bf16(blocks: np.ndarray, out: np.ndarray) -> None:
    np.left_shift(blocks.view(np.uint16), 16, out=out.view(np.uint32), dtype=np.uint32)


def _decode_q8_0(blocks: np.ndarray, out: np.ndarray) -> None:
    np.multiply(_scales(blocks), blocks[:, 2:].view(np.int8), out=out)


def _decode_q4(blocks: np.ndarray, out: np.ndarray) -> None:
    half = out.shape[1] // 2
    scales = _scales(blocks)
    for part, codes in enumerate(_nibbles(blocks[:, 2:])):
        codes -= np.uint8(8)
        np.multiply(scales, codes.view(np.int8), out=out[:, part * half : (part + 1) * half])


def _scales(blocks: np.ndarray) -> np.ndarray:
    return blocks[:, :2].copy().view(np.float16).astype(np.float32)  # [blocks, 1]


def _nibbles(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The low and the high four bits of every byte: the first and the second half of each block."""
    return packed & 15, packed >> 4


_ENCODERS: dict[BlockType, Callable[[torch.Tensor, np.ndarray], bool]] = {
    "f32": lambda chunk, out: _encode_float(chunk, out, torch.float32),
    "f16": lambda chunk, out: _encode_float(chunk, out, torch.float16),
    "bf16": lambda chunk, out: _encode_float(chunk, out, torch.bfloat16),
    "q8_0": _encode_q8_0,
    "q4_0": lambda chunk, out: _encode_q4(chunk, out, 32),
    "q4_0_64": lambda chunk, out: _encode_q4(chunk, out, 64),
}
_DECODERS: dict[BlockType, Callable[[np.ndarray, np.ndarray], None]] = {
    "f32": lambda blocks, out: _decode_float(blocks, out, np.float32),
    "f16": lambda blocks, out: _decode_float(blocks, out, np.float16),
    "bf16": _decode_bf16,
    "q8_0": _decode_q8_0,
    "q4_0": _decode_q4,
    "q4_0_64": _decode_q4,
}
