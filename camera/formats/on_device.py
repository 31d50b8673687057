"""Packing on an accelerator: the bytes of the CPU, by torch's operations alone.

What an accelerator computes is believed only after it has packed numbers that are hard to round as the CPU does.
"""

import logging
from functools import cache

import torch

from camera.devices import pinned
from camera.formats.parallel import Scratch
from camera.registry import BLOCK_FORMATS

_log = logging.getLogger(__name__)

CHUNK_WEIGHTS = 1 << 22
"""Weights that a thread sends to a device at once: enough to hide the launch of some twenty operations."""


@cache
def packs_like_the_cpu(type: str, device: torch.device) -> bool:
    """Whether a device gives the CPU's bytes, also where rounding is delicate; if not, it is said why."""
    form, weight = BLOCK_FORMATS[type], hard_to_round(BLOCK_FORMATS[type].block_length)
    expected = torch.empty(weight.numel() // form.block_length, form.block_bytes, dtype=torch.uint8)
    assert form.encode(weight, expected, Scratch())
    try:
        found = form.encode_on_device(send(weight, device)).data.cpu()
    except (RuntimeError, TypeError) as error:  # an operation that it lacks
        _log.warning("%s is packed on the CPU: %s cannot (%s)", type, device, str(error).splitlines()[0])
        return False
    if not torch.equal(found, expected):
        _log.warning("%s is packed on the CPU: %s rounds some weights differently", type, device)
        return False
    return True


def hard_to_round(length: int) -> torch.Tensor:
    """float32 [1024, length], which every type can hold: ties, zeros of either sign, blocks of very small numbers (whose
    inverse scale is infinite), codes at the edge of rounding, and plain random numbers."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1024, length, generator=generator)
    bits = weight.view(torch.int32)
    bits[:128] = bits[:128] & ~0xFFFF | 0x8000  # halfway between two of bf16's numbers
    bits[128:192] = bits[128:192] & ~0x1FFF | 0x1000  # and of fp16's
    weight[256:512] = torch.randint(-8, 9, (256, length), generator=generator) / 2  # and of codes
    weight[512:768] *= 2.0 ** torch.arange(-149, 15).repeat(2)[:256, None]
    weight[768:776] = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-39, -1e-39, 6e-8, -6e-8])[:, None]
    weight[776:800, ::2] = 0
    for rows, largest in (
        (slice(800, 912), -8),
        (slice(912, 1024), 127),
    ):  # scales of 1: all are between two codes
        weight[rows] = torch.randint(-abs(largest), abs(largest), (112, length), generator=generator) + 0.5
        weight[rows, 0] = largest
    return weight


def send(chunk: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Some rows on a device, contiguous."""
    if chunk.device.type == "cpu" != device.type:  # the device reads pinned memory by itself
        chunk = pinned(tuple(chunk.shape), chunk.dtype, device).copy_(chunk)
    return chunk.to(device, non_blocking=True).contiguous()
