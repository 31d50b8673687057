"""Whether a 4-bit layer computes what its blocks say, and how long it takes."""

from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F

from camera.devices import synchronize
from camera.engines.parts.blocks import Blocks
from camera.engines.parts.graph import Graph
from camera.engines.parts.int4_linear import Int4Linear

TOKENS = (1, 4, 16)
"""How many tokens a layer is tried with: kernels are chosen by that."""
_CALLS, _BYTES_IN_TURN, _SECONDS = 48, 256 << 20, 0.5
"""A trial multiplies by copies of a matrix in turn, so that no cache holds it from one call to the next; less often where
that would take longer."""


def tokens_and_products(blocks: Blocks, most: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens [most, K] and their exact products with the weights, float32 [most, N]; both on the CPU."""
    random = torch.Generator().manual_seed(0)
    x_MK = torch.randn((most, blocks.columns), generator=random).to(dtype)
    return x_MK, torch.cat([F.linear(x_MK.float(), part_NK) for _, part_NK in blocks.dequantized()], dim=1)


@torch.no_grad()
def relative_error(
    layer: Int4Linear, x_MK: torch.Tensor, exact_MN: torch.Tensor, device: torch.device
) -> float:
    """How far a layer's products are from the exact ones, as a share of these; NaN if one is not finite."""
    found_MN = layer(x_MK.to(device)).float().cpu()
    return float((found_MN - exact_MN).norm() / exact_MN.norm())


def is_wrong(layer: type[Int4Linear] | Int4Linear, error: float) -> bool:
    """Whether an error is more than rounding: each term may be off by that of its scale, the sum by that of the result."""
    return not error <= 4 * torch.finfo(layer.dtype).eps


@torch.inference_mode()
def seconds_of(layer: Int4Linear, device: torch.device, tokens: int = 1, *, recorded: bool = False) -> float:
    """How long a layer takes, with its weights in memory and not in a cache; the best of three.

    Args:
        layer: is multiplied with in turn with copies of it.
        device: of the layer.
        tokens: how many it is given at once.
        recorded: replay the calls as a graph; launched one by one, small kernels take as long as their launches.
    """
    x_MK = torch.ones((tokens, layer.in_features), dtype=layer.dtype, device=device)
    layer(x_MK)
    once = _seconds(lambda: layer(x_MK), device)
    calls = max(1, min(_CALLS, int(_SECONDS / once)))
    held = sum(buffer.nbytes for buffer in layer.buffers())
    layers = [layer, *(layer.twin() for _ in range(min(calls, _BYTES_IN_TURN // held)))]

    def run() -> None:
        for call in range(calls):
            layers[call % len(layers)](x_MK)

    work = Graph(run, device) if recorded else run
    return min(_seconds(work, device) for _ in range(3)) / calls


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    start = perf_counter()
    work()
    synchronize(device)
    return perf_counter() - start
