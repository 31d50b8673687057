"""The scale of each 4-bit block that leaves the least weighted error, found by trying.

For a fixed scale the best codes are the nearest ones, so a block is a search in one dimension. It goes over a grid
around the scale that the plain format takes, with either sign, since codes reach from −8 to 7 and a block whose
largest weight is positive may want it at 7 or at −8. Every point is followed by the least-squares scale of its codes.
All scales are numbers that fp16 holds before they are judged.
"""

from collections.abc import Iterator, Sequence

import torch

from camera.formats.types.q4_0 import signed_extreme
from camera.quantization.q4 import HIGHEST, LOWEST, nearest_codes, to_fp16

_SHRINK = (1.0, 1.05, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6)
"""Scales to try, of the one that makes the largest weight the outermost code: smaller ones clip it, to serve the rest."""


def best_scales(weight: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """Of each block the scale with the least Σ_j importance_j · (w_j − d·q_j)², q_j being the nearest codes.

    Args:
        weight: float32 [..., L], finite.
        importance: float32, broadcastable to `weight`, not negative.

    Returns:
        float32 [...], numbers that fp16 holds.
    """
    best = least = None
    for scale in scales_around(weight, importance, _SHRINK):
        error = weighted_error(weight, nearest_codes(weight, scale), scale, importance)
        if best is None or least is None:
            best, least = scale, error
        else:
            better = error < least
            best = torch.where(better, scale, best)
            least = torch.where(better, error, least)
    assert best is not None
    return best


def scales_around(
    weight: torch.Tensor, importance: torch.Tensor, shrink: Sequence[float]
) -> Iterator[torch.Tensor]:
    """The scale that makes the largest weight an outermost code, times each of `shrink`, for either end of the codes;
    and after each the best for the codes that it gives. With a first of 1, the first is the one that `blocks.quantize` takes."""
    extreme = signed_extreme(weight)
    for outermost in (LOWEST, HIGHEST):
        for factor in shrink:
            scale = to_fp16(extreme / outermost * factor)
            yield scale
            yield least_squares_scale(weight, nearest_codes(weight, scale), scale, importance)


def least_squares_scale(
    weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, importance: torch.Tensor
) -> torch.Tensor:
    """The scale that suits given codes best, in fp16's numbers; `scale` where all that have weight are 0."""
    weighted = importance * codes
    power = (weighted * codes).sum(-1)
    return to_fp16(torch.where(power > 0, (weighted * weight).sum(-1) / power, scale))


def weighted_error(
    weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, importance: torch.Tensor
) -> torch.Tensor:
    """Σ_j importance_j · (w_j − d·q_j)² of each block, [...]."""
    return (torch.addcmul(weight, codes, scale[..., None], value=-1).square_() * importance).sum(-1)
