"""How many channels each layer keeps, from measured curves of damage against width. Pure functions.

The sum of the layers' damages is made as small as the budget allows. Measured curves are noisy: each is first made one
that never rises with the width, then the largest convex curve below that, on which giving the next channels to whoever
gains most from them is optimal.
"""

from collections.abc import Mapping, Sequence

import numpy as np

_POINTS = 5
"""Evenly spaced widths that damage is measured at, at most; the whole width needs no measurement."""


def bounds(width: int, keep: int, bound: float, multiple_of: int) -> tuple[int, int]:
    """The least and the most channels that a layer may keep, both multiples.

    Args:
        width: channels of each layer.
        keep: channels that each would keep with one width for all, a multiple.
        bound: how far a layer may be from that, as a share of it.
        multiple_of: of what the widths are multiples.
    """
    lowest = -(-int(np.ceil(keep * (1 - bound) - 1e-9)) // multiple_of) * multiple_of
    highest = min(int(keep * (1 + bound) + 1e-9), width) // multiple_of * multiple_of
    return max(lowest, multiple_of), highest


def measured_at(width: int, keep: int, bound: float, multiple_of: int) -> list[int]:
    """The widths to measure damage at, ascending: evenly spaced between the bounds, `keep` among them."""
    lowest, highest = bounds(width, keep, bound, multiple_of)
    possible = [at for at in range(lowest, highest + 1, multiple_of) if at < width]
    spread = np.linspace(0, len(possible) - 1, min(_POINTS, len(possible))).round().astype(int)
    return sorted({keep, *(possible[index] for index in spread)})


def convex(curve: Mapping[int, float]) -> list[tuple[int, float]]:
    """The corners, by ascending width, of the largest convex curve that never rises and lies below isotonic damages.

    Args:
        curve: damage by width.
    """
    widths = sorted(curve)
    falling = _isotonic([curve[width] for width in widths])
    corners: list[tuple[int, float]] = []
    for point in zip(widths, falling, strict=True):
        while len(corners) > 1 and _slope(corners[-2], corners[-1]) >= _slope(corners[-1], point):
            corners.pop()
        corners.append(point)
    return corners


def allocate(
    curves: Sequence[Mapping[int, float]], width: int, keep: int, bound: float, multiple_of: int
) -> list[int]:
    """The width of each layer, together `keep` times the number of layers.

    Args:
        curves: of each layer, damage by width, at two widths or more between which it is interpolated; without any loss
            at the whole `width`.
        width, keep, bound, multiple_of: as for `bounds`.

    Returns:
        Multiples within the bounds. Of layers that gain alike the narrowest is widened first, so that equal curves give
        equal widths.
    """
    lowest, highest = bounds(width, keep, bound, multiple_of)
    widths = np.arange(lowest, highest + 1, multiple_of)
    damages = []
    for curve in curves:
        corners = convex({**curve, width: 0.0})
        at, losses = zip(*corners, strict=True)
        damages.append(np.interp(widths, list(at), list(losses)))
    steps = [0] * len(curves)
    for _ in range((keep - lowest) // multiple_of * len(curves)):
        open_layers = [layer for layer, step in enumerate(steps) if step + 1 < len(widths)]
        # Rounded, for along a straight piece of a curve all gains are equal but for their last bits.
        best = min(
            open_layers,
            key=lambda layer: (
                float(f"{damages[layer][steps[layer] + 1] - damages[layer][steps[layer]]:.9e}"),
                steps[layer],
                layer,
            ),
        )
        steps[best] += 1
    return [int(widths[step]) for step in steps]


def _isotonic(values: Sequence[float]) -> list[float]:
    """The nearest sequence, by least squares, that never rises: neighbours that rise are pooled."""
    pools: list[tuple[float, int]] = []
    for value in values:
        pools.append((value, 1))
        while len(pools) > 1 and pools[-1][0] > pools[-2][0]:
            (second, many), (first, some) = pools.pop(), pools.pop()
            pools.append(((first * some + second * many) / (some + many), some + many))
    return [mean for mean, count in pools for _ in range(count)]


def _slope(left: tuple[int, float], right: tuple[int, float]) -> float:
    return (right[1] - left[1]) / (right[0] - left[0])
