"""Maps of a report: a row for each decoder layer, cells from faint to strong, for channels and for experts."""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import TypeGuard

import numpy as np

from camera.report.schema import LayerExperts, LayerImportance, PruneSummary
from camera.report.svg import LEFT, RIGHT, Chart

_LEAST_ARM = 2.5
"""Of a cross that has room for an edge."""
_SHADES = 16
_CLIPPED = (0.01, 0.99)
"""Quantiles of all cells at which a map's scale ends: a few enormous channels would leave one shade for the others."""


def importance_map(layers: Sequence[LayerImportance], prune: PruneSummary | None) -> str:
    """Importance of the micro-experts of every layer, sorted, on one log scale for all layers.

    Each cell is one rank of a layer's curve. Channels that never fire have the faintest shade.
    """
    values = np.array([value for layer in layers for value in layer.curve if value > 0] or [1.0])
    low, high = (float(value) for value in np.quantile(np.log10(values), _CLIPPED))

    def share(value: float) -> float:
        return min(1.0, max(0.0, (math.log10(value) - low) / (high - low or 1.0))) if value > 0 else 0.0

    height = _row_height(len(layers)) * len(layers)
    chart = Chart("Importance by layer and rank", height + 46)
    _rows(
        chart,
        [(layer.layer, [share(value) for value in layer.curve]) for layer in layers],
        "most important",
        "least",
    )
    if is_cut(prune):
        x = LEFT + (RIGHT - LEFT) * prune.kept_width / prune.width
        chart.line(x, -4, x, height + 4, "reference")
        chart.text(x, height + 16, f"{prune.kept_width} kept", anchor="middle")
    _shades(chart, height, f"≤ {10**low:.1e}", f"≥ {10**high:.1e}")
    return chart.svg()


def tokens_map(layers: Sequence[LayerExperts]) -> str:
    """How many tokens each expert got: a row for each layer, one scale by square roots; a cross where one was dropped."""
    most = max(1, *(count for layer in layers for count in layer.tokens))
    rows = [(layer.layer, [math.sqrt(count / most) for count in layer.tokens]) for layer in layers]
    chart = _experts_chart("Tokens by layer and expert", layers, rows)
    _shades(chart, _row_height(len(layers)) * len(layers), "no token", f"{most:,} tokens")
    return chart.svg()


def kept_experts_map(layers: Sequence[LayerExperts], width: int) -> str:
    """Which share of each expert's channels stays: a row for each layer; a cross where the expert was dropped."""
    rows = [(layer.layer, [count / width for count in layer.kept]) for layer in layers]
    chart = _experts_chart("Channels kept by layer and expert", layers, rows)
    _shades(chart, _row_height(len(layers)) * len(layers), "none", f"all {width}")
    return chart.svg()


def _experts_chart(
    title: str, layers: Sequence[LayerExperts], rows: Sequence[tuple[int, Sequence[float]]]
) -> Chart:
    """A cell for each expert, experts that were dropped crossed out; room for the shades below."""
    height = _row_height(len(layers))
    chart = Chart(title, height * len(layers) + 46)
    count = max(len(shares) for _, shares in rows)
    _rows(chart, rows, "expert 0", f"expert {count - 1}")
    wide = (RIGHT - LEFT) / count
    arm = min(wide, height) * 0.28
    crosses = ""
    for index, layer in enumerate(layers):
        for expert, kept in enumerate(layer.kept):
            if not kept:
                x, y = LEFT + wide * (expert + 0.5), height * (index + 0.5) - 0.5
                for down in (1, -1):
                    crosses += f"M{x - arm:.1f} {y - down * arm:.1f}l{2 * arm:.1f} {down * 2 * arm:.1f}"
    if crosses:
        if arm > _LEAST_ARM:
            chart.add("path", "gone under", d=crosses)
        chart.add("path", "gone" if arm > _LEAST_ARM else "gone small", d=crosses)
    return chart


def kept_map(layers: Sequence[LayerImportance], width: int) -> str:
    """Which channels stay: a row for each layer, channel numbers from left to right, strong where all stay."""
    chart = Chart("Channels kept, by layer", _row_height(len(layers)) * len(layers) + 24)
    _rows(chart, [(layer.layer, layer.kept_bins) for layer in layers], "channel 0", f"channel {width - 1}")
    return chart.svg()


def _row_height(rows: int) -> float:
    """So that few layers are not giants and many stay visible."""
    return min(26.0, max(6.0, 210 / rows))


def _rows(chart: Chart, rows: Sequence[tuple[int, Sequence[float]]], first: str, last: str) -> None:
    """A row of cells for each layer, each share from 0 to 1 a shade, and words below both ends.

    Neighbours of one shade are one rectangle, and all of one shade one element.
    """
    height = _row_height(len(rows))
    boxes: dict[int, str] = defaultdict(str)
    for index, (layer, shares) in enumerate(rows):
        shades = [round(_SHADES * share) for share in shares]
        size, y, start = (RIGHT - LEFT) / max(1, len(shades)), index * height, 0
        for end in range(1, len(shades) + 1):
            if end == len(shades) or shades[end] != shades[start]:
                long = (end - start) * size
                boxes[shades[start]] += (
                    f"M{LEFT + start * size:.1f} {y:.1f}h{long:.1f}v{height - 1:.1f}h-{long:.1f}z"
                )
                start = end
        if index % math.ceil(12 / height) == 0:
            chart.text(LEFT - 6, y + height / 2 + 3.5, str(layer), anchor="end")
    for shade in sorted(boxes):
        chart.add("path", "cell", d=boxes[shade], style=f"--at:{100 * shade / _SHADES:.0f}%")
    bottom = height * len(rows) + 16
    chart.text(LEFT, bottom, first)
    chart.text(RIGHT, bottom, last, anchor="end")


def is_cut(prune: PruneSummary | None) -> TypeGuard[PruneSummary]:
    """Whether what stays of a layer are its most important channels: experts choose each for themselves."""
    return prune is not None and prune.kept_width < prune.width and prune.scope != "expert"


def _shades(chart: Chart, height: float, low: str, high: str) -> None:
    """The shades from faint to strong between the words for what they stand for, below rows of a height."""
    start, size = (LEFT + RIGHT - 9 * (_SHADES + 1)) / 2, 9
    for shade in range(_SHADES + 1):
        place = f"M{start + size * shade:.1f} {height + 30:.1f}h{size}v9h-{size}z"
        chart.add("path", "cell", d=place, style=f"--at:{100 * shade / _SHADES:.0f}%")
    chart.text(start - 8, height + 39, low, anchor="end")
    chart.text(start + size * (_SHADES + 1) + 8, height + 39, high)
