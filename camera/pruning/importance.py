"""CAMERA's importance of a micro-expert, and the choice of those that stay. Pure functions.

A micro-expert is one FFN channel: a row of gate, a row of up, and a column of down.
Source: CAMERA (AAAI 2026), the pruning criterion; rounding as in the design notes.
"""

from math import ceil

import torch

from camera.errors import CameraError
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
    norm_F = sum(rows.double().square().sum(dim=0) for rows in down_HF.split(_ROWS_AT_ONCE)).cpu()
    largest_F = statistics.max_abs_F.double().square()
    return norm_F * ((1 - reduce_ratio) * statistics.sum_squares_F + reduce_ratio * largest_F)


def kept_width(width: int, ratio: float, multiple_of: int) -> int:
    """How many of `width` channels stay: ceil((width − int(width·ratio)) / multiple_of)·multiple_of.

    Never more than `width`. Ratio 0 keeps all.

    Raises:
        CameraError: if a ratio above 0 ends up removing nothing, as 20 % of 172 in multiples of 64 does.
    """
    if ratio == 0:
        return width
    wanted = width - int(width * ratio)
    kept = min(width, ceil(wanted / multiple_of) * multiple_of)
    if kept == width:
        raise CameraError(
            f"prune.ratio {ratio} of {width} FFN channels leaves {wanted}, and rounded up to a multiple of "
            f"{multiple_of} that is all of them: nothing would be pruned. "
            f"Raise prune.ratio or lower prune.multiple_of (4 suits llama.cpp's f16; int4 on the NPU wants 64)"
        )
    return kept


def kept_channels(importance_F: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` channels of highest importance, in their original order; of equals the first stays.

    Args:
        importance_F: [F], finite.

    Returns:
        int64 [count], ascending.
    """
    order = torch.sort(importance_F.cpu(), descending=True, stable=True).indices
    return order[:count].sort().values
