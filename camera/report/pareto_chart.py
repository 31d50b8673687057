"""The plot of a sweep: every model by size and perplexity, the Pareto front drawn through the best."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from camera.report.heat_map import LEFT, RIGHT
from camera.report.svg import drawing, element, line, polyline, round_ticks, text

_TOP, _BOTTOM = 16.0, 250.0
_LETTER = 6.6
"""Width of a letter of a label, about."""
_LOG_FROM = 3.0
"""From this ratio of the largest to the smallest value on, the axis is logarithmic."""


@dataclass(frozen=True)
class Dot:
    """A model in the plane."""

    label: str
    """Beside the dot, where there is room."""
    title: str
    """What a pointer that rests on it is told."""
    x: float
    y: float
    on_front: bool = False
    reference: bool = False
    """The original or the baseline, not a member."""
    failed: bool = False
    """It fails the quality gate: drawn hollow."""


def pareto(
    name: str, dots: Sequence[Dot], across: str, line_at: tuple[float, str] | None = None, joined: bool = True
) -> Markup:
    """Dots with their labels, and steps along the front.

    Args:
        name: what a screen reader says.
        dots: at least one; every value above 0 and finite.
        across: what x is, with its unit.
        line_at: a dashed line at a y with its label, for a model that is far off to the right.
        joined: draw the front; not where x is another quantity than the one that the front is of.
    """
    ys = [dot.y for dot in dots] + ([line_at[0]] if line_at is not None else [])
    x_axis = _Axis([dot.x for dot in dots], LEFT + 14.0, RIGHT - 14.0, logarithmic=False)
    y_axis = _Axis(ys, _BOTTOM - 14.0, _TOP + 10.0, logarithmic=max(ys) / min(ys) > _LOG_FROM)
    places = [(x_axis.at(dot.x), y_axis.at(dot.y)) for dot in dots]
    parts: list[str] = [line(LEFT, _BOTTOM, RIGHT, _BOTTOM, "axis")]
    for tick, word in y_axis.ticks():
        at = y_axis.at(tick)
        parts += [line(LEFT, at, RIGHT, at, "grid"), text(LEFT - 6, at + 4, word, "muted", "end")]
    for tick, word in x_axis.ticks():
        parts.append(text(x_axis.at(tick), _BOTTOM + 17, word, "muted", "middle"))
    parts.append(text((LEFT + RIGHT) / 2, _BOTTOM + 34, across, "muted", "middle"))
    steps = _front_steps([place for dot, place in zip(dots, places, strict=True) if dot.on_front])
    if not joined:
        steps = []
    taken = [_Box(x - 5, y - 5, x + 5, y + 5) for x, y in places] + [
        _Box(min(x0, x1) - 2, min(y0, y1) - 2, max(x0, x1) + 2, max(y0, y1) + 2)
        for (x0, y0), (x1, y1) in pairwise(steps)
    ]
    if steps:
        parts.append(polyline(steps, "front"))
    if line_at is not None:
        level = y_axis.at(line_at[0])
        parts += [line(LEFT, level, RIGHT, level, "reference"), _line_label(line_at[1], level, taken)]
    for dot, (x, y) in zip(dots, places, strict=True):
        parts.append(_mark(dot, x, y))
    # The front is named first: where room is short, it is the others that go without a label.
    order = sorted(range(len(dots)), key=lambda index: (not dots[index].on_front, not dots[index].reference))
    for index in order:
        found = _label(dots[index], *places[index], taken)
        if found is not None:
            taken.append(found[1])
            parts.append(found[0])
    return drawing(name, _BOTTOM + 42, *parts)


@dataclass(frozen=True)
class _Box:
    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: "_Box") -> bool:
        apart = self.right <= other.left or other.right <= self.left
        return not (apart or self.bottom <= other.top or other.bottom <= self.top)


class _Axis:
    """Values on a line from `start` to `end`, all of them inside."""

    def __init__(self, values: Sequence[float], start: float, end: float, *, logarithmic: bool) -> None:
        self._log = logarithmic
        self.low, self.high = min(values), max(values)
        if self.low == self.high:
            self.low, self.high = self.low * 0.9, self.high * 1.1
        self._start, self._end = start, end

    def at(self, value: float) -> float:
        low, high, value = (self._scaled(number) for number in (self.low, self.high, value))
        return self._start + (self._end - self._start) * (value - low) / (high - low)

    def ticks(self) -> list[tuple[float, str]]:
        if not self._log:
            return [(tick, f"{tick:g}") for tick in round_ticks(self.low, self.high)]
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        inside = [
            factor * 10.0**power
            for power in powers
            for factor in (1, 2, 5)
            if self.low <= factor * 10.0**power <= self.high
        ]
        return [(tick, f"{tick:g}") for tick in inside[:: max(1, math.ceil(len(inside) / 7))]]

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self._log else value


def _front_steps(places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """From one to the next: to the right first, for nothing better is known before the next size."""
    ordered = sorted(places)
    points = ordered[:1]
    for x, y in ordered[1:]:
        points += [(x, points[-1][1]), (x, y)]
    return points if len(ordered) > 1 else []


def _line_label(label: str, level: float, taken: list[_Box]) -> Markup:
    """The words of a horizontal line, at the end where there is room; they are taken note of."""
    width = _LETTER * len(label)
    left, right = _Box(LEFT, level - 18, LEFT + width, level), _Box(RIGHT - width, level - 18, RIGHT, level)
    at_left = any(right.meets(other) for other in taken) and not any(left.meets(other) for other in taken)
    taken.append(left if at_left else right)
    x, anchor = (LEFT + 4, "start") if at_left else (RIGHT, "end")
    return text(x, level - 6, label, "muted halo", anchor)


def _mark(dot: Dot, x: float, y: float) -> Markup:
    kind = " ".join(["dot", *(["accent"] if dot.on_front else []), *(["hollow"] if dot.failed else [])])
    title = element("title", dot.title)
    if dot.reference:
        return element("rect", title, x=x - 4.5, y=y - 4.5, width=9, height=9, class_=kind)
    return element("circle", title, cx=x, cy=y, r=5, class_=kind)


def _label(dot: Dot, x: float, y: float, taken: Sequence[_Box]) -> tuple[Markup, _Box] | None:
    """The label at the first place beside its dot that is free, and the room that it takes."""
    width = _LETTER * len(dot.label)
    kind = "strong halo" if dot.on_front else "muted halo"
    for left, base, anchor, at in (
        (x + 9, y + 4, "start", x + 9),
        (x - 9 - width, y + 4, "end", x - 9),
        (x - width / 2, y - 10, "middle", x),
        (x - width / 2, y + 19, "middle", x),
        (x - 4, y - 10, "start", x - 4),
        (x + 4 - width, y - 10, "end", x + 4),
        (x - 4, y + 19, "start", x - 4),
        (x + 4 - width, y + 19, "end", x + 4),
    ):
        box = _Box(left, base - 11, left + width, base + 3)
        inside = box.left >= LEFT and box.right <= RIGHT + 8 and box.top >= 0 and box.bottom <= _BOTTOM
        if inside and not any(box.meets(other) for other in taken):
            return text(at, base, dot.label, kind, anchor), box
    return None
