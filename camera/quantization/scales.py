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


def scales_by_weightings(
    weight_LR: torch.Tensor, weighting_WL: torch.Tensor, shrink: Sequence[float], kept: int
) -> torch.Tensor:
    """The best scales of blocks by several weightings of their columns at once, and points of the grid.

    As `best_scales` for each weighting, with the grid of `shrink`; codes are shared, and sums over columns are matrix products.

    Args:
        weight_LR: float32 [L, R], one block a column, contiguous.
        weighting_WL: float32 [W, L], not negative.
        shrink: as for `scales_around`.
        kept: for so many of `shrink`, each end's scale and the least-squares scale by the first weighting.

    Returns:
        float32 [W + 4 · kept, R], numbers that fp16 holds.
    """
    extreme_R = signed_extreme(weight_LR.T)
    weightings = range(len(weighting_WL))
    codes_LR, product_LR = torch.empty_like(weight_LR), torch.empty_like(weight_LR)
    best = [extreme_R] * len(weightings)
    least = [torch.full_like(extreme_R, torch.inf)] * len(weightings)
    grid: list[torch.Tensor] = []

    def round_with(scale_R: torch.Tensor) -> None:
        inverse_R = scale_R.reciprocal().masked_fill_(scale_R == 0, 0.0)
        torch.mul(weight_LR, inverse_R, out=codes_LR).round_().clamp_(LOWEST, HIGHEST)

    def square_error(scale_R: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(weight_LR, codes_LR, scale_R, value=-1, out=product_LR).square_()

    def consider(number: int, scale_R: torch.Tensor, error_R: torch.Tensor) -> None:
        better_R = error_R < least[number]
        best[number] = torch.where(better_R, scale_R, best[number])
        least[number] = torch.where(better_R, error_R, least[number])

    for outermost in (LOWEST, HIGHEST):
        for step, factor in enumerate(shrink):
            scale_R = to_fp16(extreme_R / outermost * factor)
            round_with(scale_R)
            power_WR = weighting_WL @ torch.mul(codes_LR, codes_LR, out=product_LR)
            cross_WR = weighting_WL @ torch.mul(codes_LR, weight_LR, out=product_LR)
            suited_WR = to_fp16(torch.where(power_WR > 0, cross_WR / power_WR, scale_R))
            error_WR = weighting_WL @ square_error(scale_R)
            for number in weightings:
                consider(number, scale_R, error_WR[number])
                round_with(suited_WR[number])
                consider(number, suited_WR[number], weighting_WL[number] @ square_error(suited_WR[number]))
            if step < kept:
                grid += [scale_R, suited_WR[0]]
    return torch.stack([*best, *grid])


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
