"""The charts of reports, as inline SVG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from camera.report.maps import is_cut
from camera.report.schema import LayerDamage, LayerImportance, PruneSummary
from camera.report.svg import BOTTOM, LEFT, RIGHT, TOP, Chart, Scale
from camera.report.words import percent

_LETTER = 6.6
"""Width of a letter of a label, about."""
_LOG_FROM = 3.0
"""From this ratio of the largest to the smallest value on, an axis may be logarithmic."""


@dataclass(frozen=True)
class Dot:
    """A model in the plane."""

    label: str
    """Beside the dot, where there is room."""
    tooltip: str
    x: float
    y: float
    strong: bool = False
    """On the front of a sweep, or what a run was for."""
    square: bool = False
    """The original or the baseline, not a member of the sweep."""
    hollow: bool = False
    """It fails the quality gate."""


def scatter(
    title: str,
    dots: Sequence[Dot],
    across: str,
    level: tuple[float, str] | None = None,
    *,
    front: bool = False,
) -> str:
    """Models by two quantities of which less is better, with their labels.

    Args:
        title: what a screen reader says.
        dots: at least one; every value above 0 and finite.
        across: what x is, with its unit.
        level: a dashed line at a y with its label, for a model that is far off to the right.
        front: join the strong dots by steps.
    """
    chart = Chart(title, BOTTOM + 42)
    ys = [dot.y for dot in dots] + ([] if level is None else [level[0]])
    xs = [dot.x for dot in dots]
    x_scale = Scale(min(xs), max(xs), LEFT + 14, RIGHT - 14)
    y_scale = Scale(min(ys), max(ys), BOTTOM - 22, TOP + 14, log=max(ys) / min(ys) > _LOG_FROM)
    chart.line(LEFT, BOTTOM, RIGHT, BOTTOM, "axis")
    chart.y_axis(y_scale)
    chart.x_axis(across, [(x_scale.at(tick), f"{tick:g}") for tick in x_scale.ticks()])
    places = [(x_scale.at(dot.x), y_scale.at(dot.y)) for dot in dots]
    taken = [_Box(x - 5, y - 5, x + 5, y + 5) for x, y in places]
    if front:
        steps = _front_steps([place for dot, place in zip(dots, places, strict=True) if dot.strong])
        chart.path(steps, "front")
        taken += [
            _Box(min(x0, x1) - 2, min(y0, y1) - 2, max(x0, x1) + 2, max(y0, y1) + 2)
            for (x0, y0), (x1, y1) in pairwise(steps)
        ]
    if level is not None:
        y = y_scale.at(level[0])
        chart.line(LEFT, y, RIGHT, y, "reference")
        spots = [
            (RIGHT, y - 6, "end"),
            (LEFT + 4, y - 6, "start"),
            (LEFT + 4, y + 14, "start"),
            (RIGHT, y + 14, "end"),
        ]
        _label(chart, level[1], "muted halo", spots, taken)
    for dot, (x, y) in zip(dots, places, strict=True):
        kind = "dot" + " accent" * dot.strong + " hollow" * dot.hollow
        if dot.square:
            chart.add("rect", kind, tooltip=dot.tooltip, x=x - 4.5, y=y - 4.5, width=9, height=9)
        else:
            chart.dot(x, y, kind, dot.tooltip)
    # Strong ones first: where room is short, it is the others that go without a label.
    for dot, (x, y) in sorted(
        zip(dots, places, strict=True), key=lambda pair: (not pair[0].strong, not pair[0].square)
    ):
        spots = [(x + 9, y + 4, "start"), (x - 9, y + 4, "end")]
        spots += [
            (x + shift, y + below, anchor)
            for shift, anchor in ((0, "middle"), (-4, "start"), (4, "end"))
            for below in (-10, 19)
        ]
        _label(chart, dot.label, "strong halo" if dot.strong else "muted halo", spots, taken)
    return chart.svg()


def importance_curves(layers: Sequence[LayerImportance], prune: PruneSummary | None) -> str:
    """Importance from the highest micro-expert to the lowest, a line for each layer, on a log scale."""
    chart = Chart("Importance of micro-experts by layer", BOTTOM + 42)
    positive = [value for layer in layers for value in layer.curve if value > 0] or [1.0]
    x_scale = Scale(0, 1, LEFT, RIGHT)
    y_scale = Scale(min(positive), max(positive), BOTTOM - 6, TOP + 6, log=True)
    chart.y_axis(y_scale, _power_words)
    for layer in reversed(layers):
        last = max(1, len(layer.curve) - 1)
        # Channels without any activation have importance 0, which a log scale has no place for: the lowest line.
        points = [
            (x_scale.at(index / last), y_scale.at(max(value, y_scale.low)))
            for index, value in enumerate(layer.curve)
        ]
        depth = 100 * layer.layer / max(1, len(layers) - 1)
        chart.path(points, "curve", f"--at:{depth:.0f}%")
    if is_cut(prune):
        x = x_scale.at(prune.kept_width / prune.width)
        chart.line(x, TOP - 8, x, BOTTOM, "reference")
        chart.text(x - 6, TOP + 2, f"{prune.kept_width} kept", anchor="end")
    ticks = [(x_scale.at(share), f"{100 * share:g} %") for share in (0, 0.25, 0.5, 0.75, 1)]
    chart.x_axis("micro-experts, most important first", ticks)
    return chart.svg()


def kept_importance(layers: Sequence[LayerImportance], prune: PruneSummary | None) -> str:
    """The share of each layer's importance that the kept channels hold, beside their share of the channels."""
    chance = 1.0 if prune is None else prune.kept_width / prune.width
    shares = [
        _LayerShare(layer.layer, share, f"layer {layer.layer}: {percent(share, 2)}")
        for layer in layers
        if (share := layer.kept_importance) is not None
    ]
    low = max(0.0, math.floor(min([chance, *(share.value for share in shares)]) * 20 - 0.5) / 20)
    chart, scale = _by_layer("Share of importance kept, by layer", shares, Scale(low, 1, BOTTOM, TOP))
    if chance < 1:
        y = scale.at(chance)
        chart.line(LEFT, y, RIGHT, y, "reference")
        chart.text(RIGHT, y - 6, f"share of channels kept, {percent(chance)}", "muted halo", "end")
    return chart.svg()


def damage(layers: Sequence[LayerDamage]) -> str:
    """Share of each layer's FFN output that is lost: faint as CAMERA's choice loses it, strong as it was pruned."""
    words = "layer {}: {}, with CAMERA's choice alone {}"
    shares = [
        _LayerShare(
            layer.layer,
            layer.kept,
            words.format(layer.layer, percent(layer.kept, 2), percent(layer.plain, 2)),
            layer.plain,
        )
        for layer in layers
    ]
    largest = max(max(layer.plain, layer.kept) for layer in layers)
    return _by_layer("Damage by layer", shares, Scale(0, 1.06 * largest, BOTTOM, TOP))[0].svg()


class _Box(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: "_Box") -> bool:
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom


def _label(
    chart: Chart, words: str, kind: str, spots: Sequence[tuple[float, float, str]], taken: list[_Box]
) -> None:
    """Write words at the first of the spots (x, y, anchor) that is free, and note the room; nowhere if none is."""
    width = _LETTER * len(words)
    for x, y, anchor in spots:
        left = x - {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor] * width
        box = _Box(left, y - 11, left + width, y + 3)
        inside = left >= LEFT and box.right <= RIGHT + 8 and box.top >= 0 and y <= BOTTOM - 3
        if inside and not any(box.meets(other) for other in taken):
            taken.append(box)
            chart.text(x, y, words, kind, anchor)
            return


def _front_steps(places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """From one place to the next: to the right first, for nothing better is known before the next size."""
    ordered = sorted(places)
    points = ordered[:1]
    for x, y in ordered[1:]:
        points += [(x, points[-1][1]), (x, y)]
    return points


@dataclass(frozen=True)
class _LayerShare:
    layer: int
    value: float
    tooltip: str
    faint: float | None = None
    """What the value is compared with; the axis if None."""


def _by_layer(title: str, shares: Sequence[_LayerShare], scale: Scale) -> tuple[Chart, Scale]:
    """A dot for each layer, on a stem."""
    chart = Chart(title, BOTTOM + 42)
    chart.y_axis(scale, lambda share: f"{100 * share:g} %")
    step = (RIGHT - LEFT) / len(shares)
    radius = min(5.0, step * 0.35)
    places = [LEFT + step * (index + 0.5) for index in range(len(shares))]
    for x, share in zip(places, shares, strict=True):
        chart.line(
            x, BOTTOM if share.faint is None else scale.at(share.faint), x, scale.at(share.value), "stem"
        )
        if share.faint is not None:
            chart.dot(x, scale.at(share.faint), "dot", radius=radius)
        chart.dot(x, scale.at(share.value), "dot accent", share.tooltip, radius)
    names = [(x, str(share.layer)) for x, share in zip(places, shares, strict=True)]
    chart.x_axis("decoder layer", names[:: math.ceil(len(shares) / 12)])
    return chart, scale


def _power_words(value: float) -> str:
    """A power of ten, in short."""
    if 1e-3 < value < 1e4:
        return f"{value:g}"
    mantissa, power = f"{value:.0e}".split("e")
    raised = str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{'' if mantissa == '1' else mantissa + '·'}10{raised}"
