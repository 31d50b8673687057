"""The drawings of the report."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from camera.report.heat_map import LEFT, RIGHT, row_height, shaded_rows
from camera.report.schema import LayerImportance, PruneSummary
from camera.report.svg import (
    WIDTH,
    decades,
    drawing,
    element,
    line,
    polyline,
    round_ticks,
    short,
    text,
)
from camera.report.words import percent

_SHADES = 8
"""Steps of the scale of the map of kept channels."""


@dataclass(frozen=True)
class Bar:
    """One horizontal bar."""

    label: str
    value: float
    words: str
    strong: bool = False
    """The model that the run was for."""
    low: float | None = None
    high: float | None = None


def bars(label: str, entries: Sequence[Bar], reference: float | None = None) -> Markup:
    """Horizontal bars from zero, whiskers from low to high, and a dashed line at the reference."""
    start, room, row = 126.0, 180.0, 32
    largest = max([entry.high or entry.value for entry in entries] + [reference or 0]) or 1.0
    x = [start + room * entry.value / largest for entry in entries]
    parts: list[str] = []
    words: list[str] = []  # last, so that no line crosses them
    for index, entry in enumerate(entries):
        top = 4 + index * row
        parts += [
            text(
                start - 10,
                top + 17,
                short(entry.label, 18),
                "strong" if entry.strong else "",
                "end",
                entry.label,
            ),
            element(
                "rect",
                element("title", f"{entry.label}: {entry.words}"),
                x=start,
                y=top + 3.0,
                width=max(1.0, x[index] - start),
                height=19,
                rx=2,
                class_="bar accent" if entry.strong else "bar",
            ),
        ]
        end = x[index]
        if entry.low is not None and entry.high is not None:
            low, high = (start + room * bound / largest for bound in (entry.low, entry.high))
            parts += [line(low, top + 12.5, high, top + 12.5, "whisker")]
            parts += [line(bound, top + 9, bound, top + 16, "whisker") for bound in (low, high)]
            end = max(end, high)
        if reference is not None and end < (at := start + room * reference / largest) < end + 7 * len(
            entry.words
        ):
            end = at
        words.append(text(end + 7, top + 17, entry.words, "strong halo" if entry.strong else "muted halo"))
    height = 8 + row * len(entries)
    if reference is not None:
        at = start + room * reference / largest
        parts.append(line(at, 0, at, height, "reference"))
    return drawing(label, height, *parts, *words)


@dataclass(frozen=True)
class Point:
    """A model in the plane of size and perplexity."""

    label: str
    x: float
    y: float
    strong: bool = False


def scatter(label: str, points: Sequence[Point], unit: str) -> Markup:
    """Points with their names beside them: x from zero in `unit`, y from below the lowest to above the highest."""
    top, bottom = 14.0, 196.0
    right = max(point.x for point in points) * 1.06
    low, high = min(point.y for point in points), max(point.y for point in points)
    margin = (high - low) * 0.15 or abs(high) * 0.1 or 1.0
    low, high = max(0.0, low - margin), high + margin
    across = [LEFT + (RIGHT - LEFT) * point.x / right for point in points]
    down = [bottom - (bottom - top) * (point.y - low) / (high - low) for point in points]
    parts = [*_grid_y(round_ticks(low, high), low, high, top, bottom), *_ticks_x(right, unit, bottom)]
    names = _apart([at + 4 for at in down], 15)
    for point, x, y, name in zip(points, across, down, names, strict=True):
        to_left = x > WIDTH * 0.6
        parts += [
            element("circle", cx=x, cy=y, r=5, class_="dot accent" if point.strong else "dot"),
            text(
                x - 10 if to_left else x + 10,
                name,
                point.label,
                "strong" if point.strong else "",
                "end" if to_left else "start",
            ),
        ]
    return drawing(label, bottom + 36, *parts)


def importance_curves(layers: Sequence[LayerImportance], prune: PruneSummary | None) -> Markup:
    """Importance from the highest micro-expert to the lowest, a line for each layer, on a log scale."""
    top, bottom = 12.0, 226.0
    positive = [value for layer in layers for value in layer.curve if value > 0] or [1.0]
    floor = min(positive)
    low, high = math.log10(floor), math.log10(max(positive))
    margin = 0.03 * (high - low) or 0.5

    def down(value: float) -> float:
        # Channels without any activation have importance 0, which a log scale has no place for: the lowest line.
        share = (math.log10(max(value, floor)) - low + margin) / (high - low + 2 * margin)
        return bottom - (bottom - top) * share

    powers = decades(low, high)
    parts = [
        part
        for power in powers
        for part in (
            line(LEFT, down(10.0**power), RIGHT, down(10.0**power), "grid"),
            element(
                "text",
                "10",
                element("tspan", str(power).replace("-", "−"), dy=-4, class_="raised"),
                x=LEFT - 6,
                y=down(10.0**power) + 4,
                text_anchor="end",
                class_="muted",
            ),
        )
    ]
    for layer in reversed(layers):
        last = max(1, len(layer.curve) - 1)
        points = [
            (LEFT + (RIGHT - LEFT) * index / last, down(value)) for index, value in enumerate(layer.curve)
        ]
        parts.append(polyline(points, "curve", f"--at:{_depth(layer.layer, layers):.0f}%"))
    for share in (0, 0.25, 0.5, 0.75, 1):
        anchor = "start" if share == 0 else "end" if share == 1 else "middle"
        parts.append(text(LEFT + (RIGHT - LEFT) * share, bottom + 17, f"{100 * share:g} %", "muted", anchor))
    if prune is not None and prune.mean_width < prune.width:
        at = LEFT + (RIGHT - LEFT) * prune.mean_width / prune.width
        parts += [
            line(at, top - 8, at, bottom, "reference"),
            text(at - 6, top + 2, f"{prune.mean_width} kept", "muted", "end"),
        ]
    parts.append(
        text((LEFT + RIGHT) / 2, bottom + 34, "micro-experts, most important first", "muted", "middle")
    )
    return drawing("Importance of micro-experts by layer", bottom + 42, *parts)


def kept_importance(layers: Sequence[LayerImportance], prune: PruneSummary | None) -> Markup:
    """The share of each layer's importance that the kept channels hold, beside their share of the channels."""
    top, bottom = 12.0, 226.0
    shares = [(layer, layer.kept_importance) for layer in layers if layer.kept_importance is not None]
    chance = None if prune is None else prune.mean_width / prune.width
    low = min([share for _, share in shares] + ([chance] if chance is not None else []))
    low = max(0.0, math.floor(low * 20 - 0.5) / 20)
    high = 1.0

    def down(value: float) -> float:
        return bottom - (bottom - top) * (value - low) / (high - low)

    parts = [
        part
        for tick in round_ticks(100 * low, 100 * high, 5)
        for part in (
            line(LEFT, down(tick / 100), RIGHT, down(tick / 100), "grid"),
            text(LEFT - 6, down(tick / 100) + 4, f"{tick:g} %", "muted", "end"),
        )
    ]
    step = (RIGHT - LEFT) / len(shares)
    named = max(1, math.ceil(len(shares) / 12))
    for index, (layer, share) in enumerate(shares):
        x = LEFT + step * (index + 0.5)
        parts += [
            line(x, bottom, x, down(share), "stem"),
            element(
                "circle",
                element("title", f"layer {layer.layer}: {percent(share, 2)}"),
                cx=x,
                cy=down(share),
                r=min(5.0, step * 0.35),
                class_="dot accent",
            ),
        ]
        if index % named == 0:
            parts.append(text(x, bottom + 17, str(layer.layer), "muted", "middle"))
    if chance is not None and chance < 1:
        parts += [
            line(LEFT, down(chance), RIGHT, down(chance), "reference"),
            text(RIGHT, down(chance) - 6, f"share of channels kept, {percent(chance)}", "muted halo", "end"),
        ]
    parts.append(text((LEFT + RIGHT) / 2, bottom + 34, "decoder layer", "muted", "middle"))
    return drawing("Share of importance kept, by layer", bottom + 42, *parts)


def kept_map(layers: Sequence[LayerImportance], width: int) -> Markup:
    """Which channels stay: a row for each layer, channel numbers from left to right, dark where all stay."""
    rows = [[round(share * _SHADES) for share in layer.kept_bins] for layer in layers]
    parts: list[str] = [*shaded_rows(rows, [layer.layer for layer in layers], _SHADES)]
    bottom = len(layers) * row_height(len(layers))
    parts += [
        text(LEFT, bottom + 15, "channel 0", "muted"),
        text(RIGHT, bottom + 15, f"channel {width - 1}", "muted", "end"),
    ]
    return drawing("Channels kept, by layer", bottom + 24, *parts)


def _depth(layer: int, layers: Sequence[LayerImportance]) -> float:
    return 100 * layer / max(1, len(layers) - 1)


def _grid_y(ticks: Sequence[float], low: float, high: float, top: float, bottom: float) -> list[str]:
    parts: list[str] = []
    for tick in ticks:
        y = bottom - (bottom - top) * (tick - low) / (high - low)
        parts += [line(LEFT, y, RIGHT, y, "grid"), text(LEFT - 6, y + 4, f"{tick:g}", "muted", "end")]
    return parts


def _ticks_x(right: float, unit: str, bottom: float) -> list[str]:
    parts: list[str] = [line(LEFT, bottom, RIGHT, bottom, "axis")]
    for tick in round_ticks(0, right):
        x = LEFT + (RIGHT - LEFT) * tick / right
        parts.append(text(x, bottom + 17, f"{tick:g}", "muted", "middle" if tick else "start"))
    parts.append(text((LEFT + RIGHT) / 2, bottom + 33, f"size, {unit}", "muted", "middle"))
    return parts


def _apart(positions: Sequence[float], gap: float) -> list[float]:
    """The positions, moved down where two would be closer than `gap`."""
    moved = list(positions)
    order = sorted(range(len(moved)), key=lambda index: moved[index])
    for before, after in pairwise(order):
        moved[after] = max(moved[after], moved[before] + gap)
    return moved
