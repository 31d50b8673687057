"""Q8_0: 32 weights as int8 under one fp16 scale. Source: ggml's `ggml-quants.c`."""

import numpy as np
import torch

from camera.formats.format import (
    FP16_OVERFLOW,
    BlockFormat,
    Encoded,
    inverse_scale,
    store_scale,
    stored_scales,
    to_float32,
)
from camera.formats.parallel import Scratch
from camera.registry import BLOCK_FORMATS


class Q8_0(BlockFormat):
    """A scale, then 32 int8 codes: w = d · code."""

    name = "q8_0"
    block_length, block_bytes = 32, 34
    tensor_number, file_number = 8, 7
    fallback = "f16"
    in_mixtures = True

    def encode(self, chunk: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> bool:
        blocks = to_float32(chunk, scratch).view(-1, self.block_length)
        scale = torch.maximum(blocks.amax(-1), blocks.amin(-1).neg_()).abs_() / 127  # abs: no minus zero
        if not store_scale(scale, out):
            return False
        inverse, _ = inverse_scale(scale)
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

    def encode_and_decode(
        self, chunk: torch.Tensor, out: torch.Tensor, numbers: torch.Tensor, scratch: Scratch
    ) -> bool:
        if not self.encode(chunk, out, scratch):
            return False
        codes = scratch.take("codes", tuple(numbers.shape), torch.int8)  # as encode has left them
        numbers.copy_(codes).mul_(stored_scales(out))
        return True

    def encode_on_device(self, chunk: torch.Tensor) -> Encoded:
        blocks = chunk.float().view(-1, self.block_length)
        largest = blocks.abs().amax(-1)
        scale = largest / torch.full_like(largest, 127)  # by a number, CUDA would multiply with its inverse
        inverse = scale.reciprocal()
        rest = blocks * torch.where(inverse.isinf(), 0.0, inverse)[:, None]
        whole = rest.trunc()
        codes = whole + ((rest - whole) * 2).trunc()
        half = scale.half()[:, None]
        data = torch.cat((half.view(torch.uint8), codes.to(torch.int8).view(torch.uint8)), dim=1)
        return Encoded(data, codes * half.float(), (scale < FP16_OVERFLOW).all())

    def decode(self, stored: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
        out.copy_(stored[:, 2:].view(torch.int8)).mul_(stored_scales(stored))


BLOCK_FORMATS.register(Q8_0.name, Q8_0())
