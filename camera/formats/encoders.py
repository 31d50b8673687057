"""From rows of numbers to the bytes of blocks, a chunk at a time.

An encoder gets a contiguous chunk on the CPU, of any floating dtype, and uint8 [blocks, bytes of a block] to write to. It
returns False if some value does not fit. What bounds it is the number of passes over the chunk: each costs about
0.1 ns a weight. So every pass is an operation that torch or numpy vectorises, into memory that was there before.
"""

import math
from collections.abc import Callable

import numpy as np
import torch

from camera.formats.scratch import Scratch
from camera.options import BlockType

FP16_OVERFLOW = 65520
"""The smallest number that fp16 rounds to infinity."""
Encoder = Callable[[torch.Tensor, torch.Tensor, Scratch], bool]


def to_float32(chunk: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """The chunk itself, or its float32 copy in scratch memory."""
    if chunk.dtype == torch.float32:
        return chunk
    return scratch.take("float32", tuple(chunk.shape), torch.float32).copy_(chunk)


def _encode_float(chunk: torch.Tensor, out: torch.Tensor, scratch: Scratch, dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:  # by way of float32, as ggml goes
        chunk = to_float32(chunk, scratch)
    # Rounding keeps the order, so if the extremes stay finite all do; and NaN is its own extreme.
    if not torch.stack(chunk.aminmax()).to(dtype).isfinite().all():
        return False
    out.view(dtype).copy_(chunk.reshape(-1, 1))
    return True


def _encode_q8_0(chunk: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> bool:
    blocks = to_float32(chunk, scratch).view(-1, 32)
    scale = torch.maximum(blocks.amax(-1), blocks.amin(-1).neg_()).abs_() / 127  # abs: no minus zero
    if not _store_scale(scale, out):
        return False
    inverse, _ = _inverse(scale)
    scaled = scratch.take("scaled", tuple(blocks.shape), torch.float32)
    rest = torch.mul(blocks, inverse[:, None], out=scaled).numpy()
    whole = scratch.take("whole", tuple(blocks.shape), torch.float32).numpy()
    np.trunc(rest, out=whole)  # numpy's trunc is fifteen times as fast as torch's
    rest -= whole
    rest *= 2
    np.trunc(rest, out=rest)  # half away from zero; adding 0.5 to a number would round it once too often
    rest += whole
    codes = scratch.take("codes", tuple(blocks.shape), torch.int8)
    np.copyto(codes.numpy(), rest, casting="unsafe")
    out[:, 2:].view(torch.int8).copy_(codes)
    return True


def _encode_q4(chunk: torch.Tensor, out: torch.Tensor, scratch: Scratch, length: int) -> bool:
    blocks = to_float32(chunk, scratch).view(-1, length)
    shape = len(blocks), length
    scale = _signed_extreme(blocks).div_(-8)
    if not _store_scale(scale, out):
        return False
    inverse, infinite = _inverse(scale)
    scaled = torch.mul(blocks, inverse[:, None], out=scratch.take("scaled", shape, torch.float32))
    scaled.add_(8.5)  # two roundings, as the reference: never a fused one
    if len(infinite):
        # By a scale too small to invert the reference gets what converts to 0; by zero it gets 8.
        scaled[infinite[scale[infinite] != 0]] = 0
    codes = scratch.take("codes", shape, torch.uint8)
    np.copyto(codes.numpy(), scaled.numpy(), casting="unsafe")  # numpy converts six times as fast as torch
    codes.clamp_(max=15)  # what is opposite to the largest may come to 16
    # Eight codes at a time are shifted, and two joined: safe, as none has more than four bits.
    shifted = scratch.take("shifted", shape, torch.uint8)
    torch.bitwise_left_shift(codes.view(torch.int64), 4, out=shifted.view(torch.int64))
    pairs, half = torch.int16, length // 4
    low, high = codes.view(pairs)[:, :half], shifted.view(pairs)[:, half:]
    torch.bitwise_or(low, high, out=out.view(pairs)[:, 1:])
    return True


def _store_scale(scale: torch.Tensor, out: torch.Tensor) -> bool:
    """Write the scales as fp16; False if one is NaN, infinity or too large."""
    out[:, :2].view(torch.float16)[:, 0].copy_(scale)
    lowest, highest = scale.aminmax()
    return float(lowest) > -FP16_OVERFLOW and float(highest) < FP16_OVERFLOW


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
    if not larger.all():  # the sign of the first decides; often so with the few values of 16 bits
        ties = torch.nonzero(larger == 0).squeeze(1)
        tied, length = blocks[ties], blocks.shape[1]
        places = torch.arange(length, 0, -1, dtype=torch.uint8)
        first = (
            length - ((tied.abs() == extreme[ties, None]) * places).amax(-1).long()
        )  # argmax is far slower
        extreme[ties] = tied.gather(-1, first[:, None]).squeeze(1)
    return extreme


ENCODERS: dict[BlockType, Encoder] = {
    "f32": lambda chunk, out, scratch: _encode_float(chunk, out, scratch, torch.float32),
    "f16": lambda chunk, out, scratch: _encode_float(chunk, out, scratch, torch.float16),
    "bf16": lambda chunk, out, scratch: _encode_float(chunk, out, scratch, torch.bfloat16),
    "q8_0": _encode_q8_0,
    "q4_0": lambda chunk, out, scratch: _encode_q4(chunk, out, scratch, 32),
    "q4_0_64": lambda chunk, out, scratch: _encode_q4(chunk, out, scratch, 64),
}
