"""Which 4-bit kernel multiplies a matrix: one that is right on this device and, where several are, the fastest for the shape."""

import copy
import logging
from functools import cache
from time import perf_counter

import torch
import torch.nn.functional as F

from camera.devices import synchronize
from camera.engines.parts.blocks import Blocks
from camera.engines.parts.graph import FAILURES, GRAPHS, Graph, compile_many_shapes
from camera.engines.parts.int4_linear import KERNELS, Int4Linear
from camera.formats.blocks import dequantize, quantize
from camera.options import BlockType

log = logging.getLogger(__name__)

_MUST_WIN_BY = 0.15
"""Of the time: what a kernel that challenges another must save."""
_TRIAL_SECONDS = 60.0
"""All trials of a model; when they are over no further kernel may challenge."""
_CALLS, _BYTES_IN_TURN = 48, 256 << 20
"""A trial multiplies by copies of a matrix in turn, so that no cache holds it from one call to the next."""


class KernelChoice:
    """Makes the 4-bit linear layers of a model; each shape is tried once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.microseconds: dict[str, dict[str, float]] = {}
        """Of one token, by shape and kernel, where several were tried."""
        self._chosen: dict[str, type[Int4Linear]] = {}
        self._seconds_left = _TRIAL_SECONDS
        if any(kind.challenges for kind in KERNELS[device.type]):
            compile_many_shapes()

    def layer(self, blocks: Blocks, bias: torch.Tensor | None) -> Int4Linear | str:
        """The best 4-bit linear layer for some blocks, or why they must be dequantised."""
        shape = f"{blocks.type} {blocks.rows} x {blocks.columns}"
        if shape in self._chosen:
            return self._chosen[shape](blocks, bias, self.device)
        reasons, kinds = [], []
        for kind in KERNELS[self.device.type]:
            reason = kind.why_not(blocks.rows, blocks.columns, blocks.group)
            reason = reason or usable(kind, self.device, blocks.type)  # type: ignore[arg-type] # a class is hashable
            if reason is None:
                kinds.append(kind)
            else:
                reasons.append(reason)
        if not kinds:
            return "; ".join(reasons)
        best = kinds[0](blocks, bias, self.device)
        for kind in kinds[1:]:
            if kind.challenges and self._seconds_left > 0:
                began = perf_counter()
                best = self._faster(shape, best, kind(blocks, bias, self.device))
                self._seconds_left -= perf_counter() - began
        self._chosen[shape] = type(best)
        return best

    def _faster(self, shape: str, best: Int4Linear, other: Int4Linear) -> Int4Linear:
        """The other if it computes the same and saves enough time."""
        times = self.microseconds.setdefault(shape, {})
        try:
            for layer in (best, other):
                times[layer.kernel] = round(1e6 * seconds_of(layer, self.device), 2)
        except FAILURES as error:
            log.warning("%s is not used for %s: %s", other.kernel, shape, error)
            return best
        x_1K = torch.linspace(-1, 1, best.in_features, device=self.device)[None]
        found_1N, expected_1N = (layer(x_1K.to(layer.dtype)).float() for layer in (other, best))
        error_ratio = float((found_1N - expected_1N).norm() / expected_1N.norm())
        if error_ratio > 8 * torch.finfo(best.dtype).eps:
            log.warning("%s is not used for %s: off by %.1f %%", other.kernel, shape, 100 * error_ratio)
            return best
        wins = times[other.kernel] <= (1 - _MUST_WIN_BY) * times[best.kernel]
        return other if wins else best


@torch.inference_mode()
def seconds_of(layer: Int4Linear, device: torch.device) -> float:
    """How long a layer takes for one token, with its weights in memory and not in a cache; the best of three."""
    held = sum(buffer.nbytes for buffer in layer.buffers())
    layers = [layer, *(_copy(layer) for _ in range(min(_CALLS, _BYTES_IN_TURN // held)))]
    x_1K = torch.ones((1, layer.in_features), dtype=layer.dtype, device=device)

    def run() -> None:
        for call in range(_CALLS):
            layers[call % len(layers)](x_1K)

    # Launched one by one, small kernels take as long as their launches.
    work = Graph(run, device) if device.type in GRAPHS else run
    best = float("inf")
    for _ in range(3):
        synchronize(device)
        start = perf_counter()
        work()
        synchronize(device)
        best = min(best, perf_counter() - start)
    return best / _CALLS


def _copy(layer: Int4Linear) -> Int4Linear:
    """The same layer on buffers of its own."""
    other = copy.copy(layer)
    other._buffers = {
        name: None if buffer is None else buffer.clone() for name, buffer in layer.named_buffers()
    }
    other._buffers.setdefault("bias", None)
    return other


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
    exact_MN = F.linear(x_MK.float(), torch.from_numpy(dequantize(data, block_type, columns)))
    try:
        found_MN = kind(blocks, None, device)(x_MK.to(device)).float().cpu()
    except FAILURES as error:
        reason = f"{kind.kernel} failed on {device}: {error}"
    else:
        # Each term may be off by the rounding of its scale and the sum by the rounding of the result.
        error_ratio = float((found_MN - exact_MN).norm() / exact_MN.norm())
        if error_ratio <= 4 * torch.finfo(kind.dtype).eps:
            return None
        reason = f"{kind.kernel} on {device} is off by {error_ratio:.1%} against dequantised weights"
    log.warning("%s is not used for %s: %s", kind.kernel, block_type, reason)
    return reason
