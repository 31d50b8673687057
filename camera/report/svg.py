"""Elements and axes of inline SVG. Colours are left to the style sheet, so that drawings follow the page's theme.

Everything is drawn on a canvas of the same width, which a phone shows nearly full size.
"""

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

WIDTH = 440


def element(name: str, *children: str, **attributes: str | float | None) -> Markup:
    """One element. Text and attribute values are escaped; `Markup` children are not; `_` in a name means `-`."""
    written = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _value(value))
        for key, value in attributes.items()
        if value is not None
    )
    return Markup("<{}{}>{}</{}>").format(
        Markup(name), written, Markup("").join(escape(child) for child in children), Markup(name)
    )


def drawing(label: str, height: float, *children: str) -> Markup:
    """The outer element; `label` is what a screen reader says."""
    return element("svg", *children, viewBox=f"0 0 {WIDTH} {height:g}", role="img", aria_label=label)


def text(
    x: float, y: float, content: str, kind: str = "", anchor: str = "start", title: str | None = None
) -> Markup:
    """Words at a point; `kind` is a class: `muted`, `strong`."""
    children: list[str] = [content] if title is None else [content, element("title", title)]
    return element(
        "text", *children, x=x, y=y, class_=kind or None, text_anchor=None if anchor == "start" else anchor
    )


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    """A straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=kind)


def polyline(points: Sequence[tuple[float, float]], kind: str, style: str | None = None) -> Markup:
    """A line through points."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return element("polyline", points=path, class_=kind, style=style)


def round_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from `low` to `high`, about so many."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if span / (power * factor) <= count)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def decades(low: float, high: float, most: int = 6) -> list[int]:
    """Powers of ten between 10^low and 10^high, at most so many."""
    first, last = math.ceil(low), math.floor(high)
    return list(range(first, last + 1, max(1, math.ceil((last - first + 1) / most))))


def short(text: str, length: int) -> str:
    """A text cut to what fits."""
    return text if len(text) <= length else text[: length - 1] + "…"


def _value(value: str | float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
