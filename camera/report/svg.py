"""SVG drawings with axes. The style sheet colours them, so that they follow the page's theme.

All have the same width, which a phone shows nearly full size.
"""

import math
from collections.abc import Callable, Sequence
from xml.etree import ElementTree

WIDTH = 440
LEFT, RIGHT, TOP, BOTTOM = 46.0, WIDTH - 12.0, 12.0, 226.0
"""The area between the axes."""


class Scale:
    """Maps values from `low` to `high` to positions from `start` to `end`."""

    def __init__(self, low: float, high: float, start: float, end: float, *, log: bool = False) -> None:
        self.low, self.high = (low, high) if low < high else (0.9 * low, 1.1 * high or 1.0)
        self.log = log
        self._start, self._end = start, end

    def at(self, value: float) -> float:
        """The position of a value."""
        low, high, value = ((math.log10(v) if self.log else v) for v in (self.low, self.high, value))
        return self._start + (self._end - self._start) * (value - low) / (high - low)

    def ticks(self, most: int = 5) -> list[float]:
        """Round numbers inside, about so many."""
        span = self.high - self.low
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for factors in ((1, 2, 5), (1,)):
                found = [factor * 10.0**power for power in powers for factor in factors]
                found = [value for value in found if self.low <= value <= self.high]
                if len(found) <= most + 2:
                    break
            return found[:: math.ceil(len(found) / (most + 2)) or 1]
        power = 10.0 ** math.floor(math.log10(span / most))
        step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if span / (power * factor) <= most)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


class Chart:
    """An SVG drawing that grows element by element. What it is given as words is escaped."""

    def __init__(self, title: str, height: float) -> None:
        """`title` is what a screen reader says."""
        about = {"viewBox": f"0 0 {WIDTH} {height:g}", "role": "img", "aria-label": title}
        self._svg = ElementTree.Element("svg", about)

    def add(
        self, tag: str, kind: str, words: str = "", tooltip: str = "", **attributes: float | str | None
    ) -> None:
        """An element of a class of the style sheet."""
        written = {
            key.replace("_", "-"): f"{value:.5g}" if isinstance(value, int | float) else value
            for key, value in attributes.items()
            if value is not None
        }
        element = ElementTree.SubElement(self._svg, tag, {"class": kind, **written})
        element.text = words or None
        if tooltip:
            ElementTree.SubElement(element, "title").text = tooltip

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        """A straight line."""
        self.add("line", kind, x1=x1, y1=y1, x2=x2, y2=y2)

    def path(self, points: Sequence[tuple[float, float]], kind: str, style: str | None = None) -> None:
        """A line through points."""
        places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.add("polyline", kind, points=places, style=style)

    def text(self, x: float, y: float, words: str, kind: str = "muted", anchor: str = "start") -> None:
        """Words that start, end or have their middle at a point."""
        self.add("text", kind, words, x=x, y=y, text_anchor=anchor)

    def dot(self, x: float, y: float, kind: str, tooltip: str = "", radius: float = 5.0) -> None:
        """A circle."""
        self.add("circle", kind, tooltip=tooltip, cx=x, cy=y, r=radius)

    def y_axis(self, scale: Scale, words: Callable[[float], str] = lambda value: f"{value:g}") -> None:
        """Lines across at round values, with their numbers."""
        for tick in scale.ticks():
            y = scale.at(tick)
            self.line(LEFT, y, RIGHT, y, "grid")
            self.text(LEFT - 6, y + 4, words(tick), anchor="end")

    def x_axis(self, title: str, ticks: Sequence[tuple[float, str]]) -> None:
        """Words at positions, and below them what they are of."""
        for x, words in ticks:
            self.text(x, BOTTOM + 17, words, anchor="middle")
        self.text((LEFT + RIGHT) / 2, BOTTOM + 34, title, anchor="middle")

    def svg(self) -> str:
        """The drawing, for a page."""
        return ElementTree.tostring(self._svg, encoding="unicode")
