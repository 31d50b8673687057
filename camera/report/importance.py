"""Importance of every layer, small enough to draw: quantiles, the sorted curve, and which channels stay."""

import numpy as np
import torch

from camera.report.schema import LayerImportance

CURVE_POINTS = 64
BINS = 256


def summarize_layer(
    layer: int,
    scores_F: torch.Tensor,
    kept_K: torch.Tensor | None = None,
    kept_importance: float | None = None,
) -> LayerImportance:
    """Sum up one layer.

    Args:
        layer: its number.
        scores_F: importance of its micro-experts, float64 [F].
        kept_K: the channels that stay, int64 [K], where something was pruned.
        kept_importance: the share of importance that they hold.
    """
    scores = scores_F.numpy()
    return LayerImportance(
        layer=layer,
        quartiles=tuple(float(value) for value in np.quantile(scores, (0, 0.25, 0.5, 0.75, 1))),
        curve=_curve(scores),
        kept_importance=kept_importance,
        kept_bins=() if kept_K is None else _bins(len(scores), kept_K.numpy()),
    )


def _curve(scores: np.ndarray) -> tuple[float, ...]:
    ranks = np.linspace(0, len(scores) - 1, min(CURVE_POINTS, len(scores))).round().astype(int)
    # Five digits draw any curve, and keep results.json small.
    return tuple(float(f"{value:.5g}") for value in np.sort(scores)[::-1][ranks])


def _bins(width: int, kept: np.ndarray) -> tuple[float, ...]:
    mask = np.zeros(width)
    mask[kept] = 1
    return tuple(round(float(part.mean()), 3) for part in np.array_split(mask, min(BINS, width)))
