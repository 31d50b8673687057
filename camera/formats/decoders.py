"""From the bytes of blocks to float32 numbers, a chunk at a time.

A decoder gets uint8 [blocks, bytes of a block], contiguous, and float32 [blocks, weights of a block] to write to.
"""

from collections.abc import Callable

import torch

from camera.formats.scratch import Scratch
from camera.options import BlockType

Decoder = Callable[[torch.Tensor, torch.Tensor, Scratch], None]


def _decode_float(blocks: torch.Tensor, out: torch.Tensor, dtype: torch.dtype) -> None:
    out.copy_(blocks.view(dtype))


def _decode_q8_0(blocks: torch.Tensor, out: torch.Tensor, _: Scratch) -> None:
    torch.mul(blocks[:, 2:].view(torch.int8), _scales(blocks), out=out)


def _decode_q4(blocks: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
    half = out.shape[1] // 2
    low = scratch.take("low", (len(blocks), half), torch.uint8).copy_(blocks[:, 2:])
    high = scratch.take("high", (len(blocks), half), torch.uint8)
    # Eight bytes at a time; the bits that come over from a neighbour are those that the next line drops.
    torch.bitwise_right_shift(low.view(torch.int64), 4, out=high.view(torch.int64))
    scales = _scales(blocks)
    for codes, part in ((low, out[:, :half]), (high, out[:, half:])):
        torch.mul(codes.bitwise_and_(15).view(torch.int8).sub_(8), scales, out=part)


def _scales(blocks: torch.Tensor) -> torch.Tensor:
    return blocks[:, :2].view(torch.float16).float()  # [blocks, 1]


DECODERS: dict[BlockType, Decoder] = {
    "f32": lambda blocks, out, _: _decode_float(blocks, out, torch.float32),
    "f16": lambda blocks, out, _: _decode_float(blocks, out, torch.float16),
    "bf16": lambda blocks, out, _: _decode_float(blocks, out, torch.bfloat16),
    "q8_0": _decode_q8_0,
    "q4_0": _decode_q4,
    "q4_0_64": _decode_q4,
}
