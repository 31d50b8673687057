"""Q4_0: 32 weights as nibbles under one fp16 scale. Source: ggml's `ggml-quants.c`."""

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


class Q4_0(BlockFormat):
    """A scale d of either sign, then nibbles n from 0 to 15: w = d · (n − 8). The low nibbles of the bytes are the first
    half of the block, the high ones the second."""

    name = "q4_0"
    block_length, block_bytes = 32, 18
    tensor_number, file_number = 2, 2
    fallback = "f16"
    in_mixtures = True

    def encode(self, chunk: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> bool:
        length = self.block_length
        blocks = to_float32(chunk, scratch).view(-1, length)
        shape = len(blocks), length
        scale = signed_extreme(blocks).div_(-8)
        if not store_scale(scale, out):
            return False
        inverse, infinite = inverse_scale(scale)
        scaled = torch.mul(blocks, inverse[:, None], out=scratch.take("scaled", shape, torch.float32))
        scaled.add_(8.5)  # two roundings, as the reference: never a fused one
        if len(infinite):
            # By a scale too small to invert the reference gets what converts to 0; by zero it gets 8.
            scaled[infinite[scale[infinite] != 0]] = 0
        codes = scratch.take("codes", shape, torch.uint8)
        np.copyto(
            codes.numpy(), scaled.numpy(), casting="unsafe"
        )  # numpy converts six times as fast as torch
        codes.clamp_(max=15)  # what is opposite to the largest may come to 16
        # Eight codes at a time are shifted, and two joined: safe, as none has more than four bits.
        shifted = scratch.take("shifted", shape, torch.uint8)
        torch.bitwise_left_shift(codes.view(torch.int64), 4, out=shifted.view(torch.int64))
        pairs, half = torch.int16, length // 4
        low, high = codes.view(pairs)[:, :half], shifted.view(pairs)[:, half:]
        torch.bitwise_or(low, high, out=out.view(pairs)[:, 1:])
        return True

    def encode_and_decode(
        self, chunk: torch.Tensor, out: torch.Tensor, numbers: torch.Tensor, scratch: Scratch
    ) -> bool:
        if not self.encode(chunk, out, scratch):
            return False
        codes = scratch.take("codes", tuple(numbers.shape), torch.uint8)  # as encode has left them
        numbers.copy_(codes.sub_(8).view(torch.int8)).mul_(stored_scales(out))
        return True

    def encode_on_device(self, chunk: torch.Tensor) -> Encoded:
        blocks, middle = chunk.float().view(-1, self.block_length), self.block_length // 2
        scale = _signed_extreme_on_device(blocks) / -8
        inverse = scale.reciprocal()
        infinite = inverse.isinf()
        shifted = blocks * torch.where(infinite, 0.0, inverse)[:, None] + 8.5
        shifted = torch.where((infinite & (scale != 0))[:, None], 0.0, shifted)
        codes = shifted.trunc().clamp_max(15)
        pairs = codes[:, :middle] + codes[:, middle:] * 16
        half = scale.half()[:, None]
        data = torch.cat((half.view(torch.uint8), pairs.to(torch.uint8)), dim=1)
        return Encoded(data, (codes - 8) * half.float(), (scale.abs() < FP16_OVERFLOW).all())

    def decode(self, stored: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
        half = self.block_length // 2
        low = scratch.take("low", (len(stored), half), torch.uint8).copy_(stored[:, 2:])
        high = scratch.take("high", (len(stored), half), torch.uint8)
        # Eight bytes at a time; the bits that come over from a neighbour are those that the next line drops.
        torch.bitwise_right_shift(low.view(torch.int64), 4, out=high.view(torch.int64))
        scales = stored_scales(stored)
        for codes, part in ((low, out[:, :half]), (high, out[:, half:])):
            torch.mul(codes.bitwise_and_(15).view(torch.int8).sub_(8), scales, out=part)

    def join(self, nibbles: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """The bytes of a matrix, on the device of its parts.

        Args:
            nibbles: uint8 [rows, row_length].
            scales: float16 [rows, blocks in a row].

        Returns:
            uint8 [rows, bytes per row].
        """
        rows, half = len(nibbles), self.block_length // 2
        low, high = nibbles.reshape(rows, -1, 2, half).unbind(2)
        out = torch.empty(rows, low.shape[1], self.block_bytes, dtype=torch.uint8, device=nibbles.device)
        out[..., :2] = scales.contiguous()[..., None].view(torch.uint8)
        torch.bitwise_or(low, high << 4, out=out[..., 2:])
        return out.flatten(1)


def signed_extreme(blocks: torch.Tensor) -> torch.Tensor:
    """Of each row the value of largest magnitude, with its sign; of equals the first. NaN if there is one.

    Args:
        blocks: float32 [..., L].
    """
    if blocks.device.type != "cpu":
        return _signed_extreme_on_device(blocks)
    highest, lowest = blocks.amax(-1), blocks.amin(-1)
    larger = highest + lowest  # its sign says which has the larger magnitude; zero if neither
    extreme = torch.maximum(highest, lowest.neg_()).copysign_(larger).contiguous()
    # The sign of the first of them decides; often so with the few values of 16 bits. numpy finds ten times as fast.
    ties = torch.from_numpy(np.flatnonzero(larger.numpy() == 0))
    if len(ties):
        tied = blocks.reshape(-1, blocks.shape[-1]).index_select(0, ties)
        flat = extreme.view(-1)
        largest = tied.abs() == flat.index_select(0, ties).abs_()[:, None]
        first = torch.from_numpy(largest.numpy().argmax(-1))
        flat[ties] = tied.gather(-1, first[:, None]).squeeze(1)
    return extreme


def _signed_extreme_on_device(blocks: torch.Tensor) -> torch.Tensor:
    """The same without waiting for the device."""
    length = blocks.shape[-1]
    magnitude = blocks.abs()
    places = torch.arange(length, 0, -1, device=blocks.device)
    largest = magnitude == magnitude.amax(-1, keepdim=True)
    first = length - (largest * places).amax(-1, keepdim=True).clamp_min_(
        1
    )  # of NaN, which equals nothing, the last
    return torch.where(magnitude.isnan().any(-1), torch.nan, blocks.gather(-1, first).squeeze(-1))


BLOCK_FORMATS.register(Q4_0.name, Q4_0())
