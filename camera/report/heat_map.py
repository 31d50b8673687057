"""Maps of the layers: a row for each decoder layer, shades from faint to strong."""

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from camera.report.schema import LayerImportance, PruneSummary
from camera.report.svg import WIDTH, drawing, element, line, text

LEFT, RIGHT = 46, WIDTH - 12
_STEPS = 16
_CLIPPED = (0.01, 0.99)
"""Quantiles of all cells at which the scale ends: a few enormous channels would leave one shade for the others."""


def row_height(rows: int) -> float:
    """Height of one row, so that few layers are not giants and many stay visible."""
    return min(26.0, max(6.0, 210 / rows))


def shaded_rows(rows: Sequence[Sequence[int]], labels: Sequence[int], steps: int) -> list[Markup]:
    """Cells of equal width from `LEFT` to `RIGHT`, and the names of the rows as far as there is room.

    Args:
        rows: the shade of each cell, 0 to `steps`; neighbours of one shade become one rectangle.
        labels: the layer of each row.
        steps: the strongest shade.
    """
    height = row_height(len(rows))
    named = max(1, math.ceil(12 / height))
    boxes: dict[int, list[str]] = defaultdict(list)
    parts: list[Markup] = []
    for index, (shades, label) in enumerate(zip(rows, labels, strict=True)):
        y = index * height
        size = (RIGHT - LEFT) / max(1, len(shades))
        start = 0
        for end in range(1, len(shades) + 1):
            if end == len(shades) or shades[end] != shades[start]:
                x, long = LEFT + start * size, (end - start) * size
                boxes[shades[start]].append(f"M{x:.1f} {y:.1f}h{long:.1f}v{height - 1:.1f}h-{long:.1f}z")
                start = end
        if index % named == 0:
            parts.append(text(LEFT - 6, y + height / 2 + 3.5, str(label), "muted", "end"))
    parts += [
        element("path", d="".join(boxes[shade]), class_="cell", style=f"--at:{100 * shade / steps:.0f}%")
        for shade in sorted(boxes)
    ]
    return parts


def importance_map(layers: Sequence[LayerImportance], prune: PruneSummary | None) -> Markup:
    """Importance of the micro-experts of every layer, sorted, on one log scale for all layers.

    Each cell is one rank of a layer's curve. Channels that never fire have the faintest shade.
    """
    values = np.array([value for layer in layers for value in layer.curve if value > 0] or [1.0])
    low, high = (float(value) for value in np.quantile(np.log10(values), _CLIPPED))
    span = (high - low) or 1.0

    def shade(value: float) -> int:
        share = (math.log10(value) - low) / span if value > 0 else 0.0
        return round(_STEPS * min(1.0, max(0.0, share)))

    rows = [[shade(value) for value in layer.curve] for layer in layers]
    bottom = len(layers) * row_height(len(layers))
    parts: list[str] = [*shaded_rows(rows, [layer.layer for layer in layers], _STEPS)]
    if prune is not None and prune.mean_width < prune.width:
        at = LEFT + (RIGHT - LEFT) * prune.mean_width / prune.width
        parts += [
            line(at, -4, at, bottom + 4, "reference"),
            text(at, bottom + 16, f"{prune.mean_width} kept", "muted", "middle"),
        ]
    parts += [
        text(LEFT, bottom + 16, "most important", "muted"),
        text(RIGHT, bottom + 16, "least", "muted", "end"),
        *_scale(bottom + 30, low, high),
    ]
    return drawing("Importance by layer and rank", bottom + 46, *parts)


def _scale(top: float, low: float, high: float) -> list[Markup]:
    """The shades from faint to strong between the powers of ten that they stand for."""
    size = 9.0
    start = (LEFT + RIGHT - size * (_STEPS + 1)) / 2
    parts = [
        element(
            "path",
            d=f"M{start + size * step:.1f} {top:.1f}h{size:.1f}v9h-{size:.1f}z",
            class_="cell",
            style=f"--at:{100 * step / _STEPS:.0f}%",
        )
        for step in range(_STEPS + 1)
    ]
    end = start + size * (_STEPS + 1)
    return [
        *parts,
        text(start - 8, top + 9, f"≤ {10**low:.1e}", "muted", "end"),
        text(end + 8, top + 9, f"≥ {10**high:.1e}", "muted"),
    ]
