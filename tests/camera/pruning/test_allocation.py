"""Channels spread over layers: the budget is exact, bounds and multiples hold, and equal layers get equal widths."""

import random
from collections.abc import Callable
from itertools import pairwise

import pytest

from camera.pruning.allocation import allocate, bounds, convex, measured_at

CASES = [
    (640, 512, 0.5, 64),
    (172, 140, 0.5, 4),
    (12800, 10240, 0.3, 64),
    (172, 64, 1.0, 64),
    (100, 49, 0.3, 7),
]


def noisy_curves(layers: int, points: list[int], seed: int) -> list[dict[int, float]]:
    draw = random.Random(seed)
    return [{at: draw.random() / at for at in points} for _ in range(layers)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("width", "keep", "bound", "multiple"), CASES)
def test_the_budget_is_kept_to_the_channel_in_multiples_within_the_bound(
    width: int, keep: int, bound: float, multiple: int, seed: int
) -> None:
    curves = noisy_curves(7, measured_at(width, keep, bound, multiple), seed)
    widths = allocate(curves, width, keep, bound, multiple)
    assert sum(widths) == 7 * keep
    assert all(at % multiple == 0 and at <= width for at in widths)
    assert all(keep * (1 - bound) <= at <= keep * (1 + bound) for at in widths)
    assert len(set(widths)) > 1 or bounds(width, keep, bound, multiple)[0] == keep


@pytest.mark.parametrize("shape", [lambda at: (200 - at) ** 2, lambda at: 200 - at, lambda at: 0.0])
def test_equal_curves_give_equal_widths(shape: Callable[[int], float]) -> None:
    curve = {at: float(shape(at)) for at in measured_at(200, 120, 0.5, 4)}
    assert allocate([curve] * 6, 200, 120, 0.5, 4) == [120] * 6


def test_the_layer_whose_channels_matter_more_keeps_more() -> None:
    points = measured_at(640, 384, 0.5, 64)
    weak, strong = ({at: scale * (640 - at) ** 2 for at in points} for scale in (1.0, 20.0))
    assert allocate([weak, strong], 640, 384, 0.5, 64) == [192, 576]


def test_no_other_spread_of_the_budget_loses_less_on_convex_curves() -> None:
    draw = random.Random(5)
    points = list(range(4, 40, 4))
    shapes = [(draw.random(), draw.uniform(1.2, 3)) for _ in range(3)]
    curves = [{at: scale * (40 - at) ** power for at in points} for scale, power in shapes]

    def loss(widths: tuple[int, ...]) -> float:
        return sum(curve.get(at, 0.0) for curve, at in zip(curves, widths, strict=True))

    found = allocate(curves, 40, 20, 1.0, 4)
    every = [(a, b, 60 - a - b) for a in [*points, 40] for b in [*points, 40] if 4 <= 60 - a - b <= 40]
    assert loss(tuple(found)) == pytest.approx(min(map(loss, every)))


def test_a_noisy_curve_becomes_one_that_falls_and_is_convex() -> None:
    corners = convex({10: 5.0, 20: 6.0, 30: 1.0, 40: 2.0, 50: 0.0})
    assert corners[0] == (10, 5.5)
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(corners)]
    assert slopes == sorted(slopes)
    assert all(slope <= 0 for slope in slopes)


def test_damage_is_measured_at_both_bounds_and_at_the_one_width() -> None:
    assert measured_at(12800, 10240, 0.2, 64)[0] == 8192
    assert measured_at(12800, 10240, 0.2, 64)[-1] == 12288
    assert 10240 in measured_at(12800, 10240, 0.2, 64)
    assert measured_at(640, 512, 0.5, 64)[-1] == 576  # the whole width loses nothing
