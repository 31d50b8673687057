"""The scale of each 4-bit block that leaves the least weighted error, found by trying.

For a fixed scale the best codes are the nearest ones, so a block is a search in one dimension. It goes over a grid
around the scale that the plain format takes, with either sign, since codes reach from −8 to 7 and a block whose
largest weight is positive may want it at 7 or at −8. Every point is followed by the least-squares scale of its codes.
All scales are numbers that fp16 holds before they are judged.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from camera.formats import blocks
from camera.formats.parallel import map_chunks
from camera.options import BlockType
from camera.quantization.q4 import HIGHEST, LOWEST, nearest_codes, pack, to_fp16

_SHRINK = (1.0, 1.05, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6)
"""Scales to try, of the one that makes the largest weight the outermost code: smaller ones clip it, to serve the rest."""
_CHUNK_WEIGHTS = 1 << 18
"""Weights searched at once: every operand of the inner loop stays in the cache."""


def quantize_by_search(
    weight: torch.Tensor, type: BlockType, importance: torch.Tensor | None = None, *, name: str = "the tensor"
) -> np.ndarray:
    """Numbers to blocks with the scales of `best_scales`; never more weighted error than `blocks.quantize`.

    Args:
        weight: [rows, row_length], any floating dtype.
        type: `q4_0` or `q4_0_64`.
        importance: [row_length], not negative: the second moment of each column's input; None weighs all alike.
        name: of the tensor, for messages.

    Returns:
        uint8 [rows, bytes per row].

    Raises:
        CameraError: as `blocks.quantize`.
    """
    plain = blocks.quantize(weight, type, name=name)  # refuses what no block can hold
    length = blocks.FORMATS[type].block_length
    rows, row_length = weight.shape
    weights = _block_weights(importance, row_length, length)
    step = max(1, _CHUNK_WEIGHTS // row_length)

    def search(start: int) -> None:
        chunk = weight[start : start + step].detach().cpu().float().reshape(-1, row_length // length, length)
        scales = best_scales(chunk, weights)
        codes = nearest_codes(chunk, scales)
        plain[start : start + step] = pack(codes.reshape(-1, row_length), scales, type)

    map_chunks(search, range(0, rows, step))
    return plain


def best_scales(weight: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """Of each block the scale with the least Σ_j importance_j · (w_j − d·q_j)², q_j being the nearest codes.

    Args:
        weight: float32 [..., L], finite.
        importance: float32, broadcastable to `weight`, not negative.

    Returns:
        float32 [...], numbers that fp16 holds.
    """
    best = least = None
    for scale in candidate_scales(weight, importance):
        error = weighted_error(weight, nearest_codes(weight, scale), scale, importance)
        if best is None or least is None:
            best, least = scale, error
        else:
            better = error < least
            best = torch.where(better, scale, best)
            least = torch.where(better, error, least)
    assert best is not None
    return best


def candidate_scales(weight: torch.Tensor, importance: torch.Tensor) -> Iterator[torch.Tensor]:
    """The scales that are tried, [...] each; the first is the one that `blocks.quantize` takes."""
    return scales_around(weight, importance, _SHRINK)


def scales_around(
    weight: torch.Tensor, importance: torch.Tensor, shrink: Sequence[float]
) -> Iterator[torch.Tensor]:
    """The scale that makes the largest weight an outermost code, times each of `shrink`, for either end of the codes;
    and after each the best for the codes that it gives."""
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


def signed_extreme(weight: torch.Tensor) -> torch.Tensor:
    """Of each block the weight of largest magnitude, with its sign; of equals the first."""
    return weight.gather(-1, weight.abs().argmax(-1, keepdim=True))[..., 0]


def _block_weights(importance: torch.Tensor | None, row_length: int, length: int) -> torch.Tensor:
    """[blocks in a row, L]; a block whose inputs were never anything weighs its columns alike."""
    if importance is None:
        return torch.ones(row_length // length, length)
    weights = importance.detach().cpu().float().reshape(-1, length)
    return torch.where(weights.sum(-1, keepdim=True) > 0, weights, 1.0)
