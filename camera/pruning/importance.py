"""CAMERA's importance of a micro-expert, and the channels of the highest. Pure functions.

A micro-expert is one FFN channel: a row of gate, a row of up, and a column of down.
Source: CAMERA (AAAI 2026), the pruning criterion.
"""

from typing import Any

import torch

from camera.layerwise.statistics import LayerStatistics

_ROWS_AT_ONCE = 32  # of a down projection in float64: 3 MB for 12,800 channels, which stays in the cache


def importance(statistics: LayerStatistics, down_HF: torch.Tensor, reduce_ratio: float) -> torch.Tensor:
    """E_c = ‖w_down,c‖² · [(1 − α)·Σ_t a_tc² + α·max_t a_tc²], α = `reduce_ratio`.

    Args:
        statistics: sums over the calibration tokens t of the activations a that enter `down_proj`.
        down_HF: the down projection [hidden, F], any dtype.
        reduce_ratio: α in [0, 1].

    Returns:
        float64 [F] on the CPU.
    """
    norms: Any = sum(rows.double().square().sum(dim=0) for rows in down_HF.split(_ROWS_AT_ONCE))
    norm_F: torch.Tensor = norms.cpu()
    largest_F = statistics.max_abs_F.double().square()
    return norm_F * ((1 - reduce_ratio) * statistics.sum_squares_F + reduce_ratio * largest_F)


def kept_channels(importance_F: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` channels of highest importance, in their original order; of equals the first stays.

    Args:
        importance_F: [F], finite.

    Returns:
        int64 [count], ascending.
    """
    order = torch.sort(importance_F.cpu(), descending=True, stable=True).indices
    return order[:count].sort().values
