"""The drawing of the damage per layer."""

import math
from collections.abc import Sequence

from markupsafe import Markup

from camera.report.heat_map import LEFT, RIGHT
from camera.report.schema import LayerDamage
from camera.report.svg import drawing, element, line, round_ticks, text
from camera.report.words import percent

_TOP, _BOTTOM = 12.0, 226.0


def damage_by_layer(layers: Sequence[LayerDamage]) -> Markup:
    """Share of each layer's FFN output that is lost: faint as plain CAMERA cuts it, strong as it was cut."""
    largest = max(value for layer in layers for value in (layer.plain, layer.kept))
    high = 1.06 * largest or 1.0

    def down(value: float) -> float:
        return _BOTTOM - (_BOTTOM - _TOP) * value / high

    parts: list[str] = []
    for tick in round_ticks(0, 100 * high, 5):
        y = down(tick / 100)
        parts += [line(LEFT, y, RIGHT, y, "grid"), text(LEFT - 6, y + 4, f"{tick:g} %", "muted", "end")]
    step = (RIGHT - LEFT) / len(layers)
    named = max(1, math.ceil(len(layers) / 12))
    radius = min(5.0, step * 0.35)
    for index, layer in enumerate(layers):
        x = LEFT + step * (index + 0.5)
        words = f"layer {layer.layer}: {percent(layer.kept, 2)}, cut plainly {percent(layer.plain, 2)}"
        parts += [
            line(x, down(layer.plain), x, down(layer.kept), "stem"),
            element("circle", cx=x, cy=down(layer.plain), r=radius, class_="dot"),
            element(
                "circle",
                element("title", words),
                cx=x,
                cy=down(layer.kept),
                r=radius,
                class_="dot accent",
            ),
        ]
        if index % named == 0:
            parts.append(text(x, _BOTTOM + 17, str(layer.layer), "muted", "middle"))
    parts.append(text((LEFT + RIGHT) / 2, _BOTTOM + 34, "decoder layer", "muted", "middle"))
    return drawing("Damage by layer", _BOTTOM + 42, *parts)
