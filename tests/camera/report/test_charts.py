"""The charts: scales and ticks, escaped words, and what each drawing shows."""

import re

import pytest

from camera.report.charts import Dot, damage, importance_curves, scatter
from camera.report.maps import importance_map, kept_map
from camera.report.schema import LayerDamage, LayerImportance, PruneSummary
from camera.report.svg import Chart, Scale


def layer(number: int, *curve: float) -> LayerImportance:
    return LayerImportance(layer=number, quartiles=(0,) * 5, curve=curve)


def shares(drawn: str) -> list[int]:
    """Shades in the order in which they are drawn, the scale's left out."""
    return [int(share) for share in re.findall(r"--at:(\d+)%", drawn)][:-17]


def test_a_layer_that_matters_more_is_stronger_throughout() -> None:
    weak, strong = layer(0, 1.0, 1.0), layer(1, 1000.0, 1000.0)
    assert shares(importance_map((weak, strong), None)) == [0, 100]


def test_neighbours_of_one_shade_are_one_rectangle() -> None:
    rows = [
        layer(number, 1.0).model_copy(update={"kept_bins": bins})
        for number, bins in enumerate([(0.0, 0.0, 1.0, 1.0), (1.0, 1.0, 1.0, 1.0)])
    ]
    drawn = kept_map(rows, 4)
    assert drawn.count("<path") == 2
    assert len(re.findall(r"M[\d.]+ ", drawn)) == 3


def test_channels_that_never_fire_have_the_faintest_shade_and_break_nothing() -> None:
    drawn = importance_map((layer(0, 10.0, 1.0, 0.0), layer(1, 0.0, 0.0, 0.0)), None)
    assert min(shares(drawn)) == 0
    assert "nan" not in drawn
    assert "nan" not in importance_map((layer(0, 0.0),), None)


def test_one_enormous_channel_leaves_the_others_their_shades() -> None:
    curve = (1e30, *(10.0 ** (-index / 50) for index in range(199)))
    assert len(set(shares(importance_map((layer(0, *curve),), None)))) > 10


def test_the_kept_width_is_marked_where_something_was_pruned() -> None:
    prune = PruneSummary(
        ratio=0.25, mode="physical", multiple_of=1, width=4, kept_width=3, removed_share=0.25
    )
    whole = prune.model_copy(update={"kept_width": 4, "removed_share": 0.0})
    assert "3 kept" in importance_map((layer(0, 4, 3, 2, 1),), prune)
    assert "kept" not in importance_map((layer(0, 4, 3, 2, 1),), whole)


def test_labels_never_lie_on_each_other() -> None:
    dots = [Dot(f"member-{index}", "", 100 + index % 3, 10 + index % 4 / 100) for index in range(30)]
    drawn = scatter("x", dots, "size")
    labels = re.findall(r'<text class="muted halo" x="([\d.]+)" y="([\d.]+)"', drawn)
    assert 0 < len(labels) <= 30
    assert len(set(labels)) == len(labels)


def test_perplexities_far_apart_are_drawn_on_a_log_scale() -> None:
    dots = [Dot("a", "", 1, 10), Dot("b", "", 2, 100), Dot("c", "", 3, 1000)]
    heights = [float(y) for y in re.findall(r'cy="([\d.]+)"', scatter("x", dots, "size"))]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.1)
    assert "nan" not in scatter("x", [Dot("one", "", 5, 5)], "size")


def heights(drawn: str, kind: str) -> list[float]:
    return [float(y) for y in re.findall(rf'<circle class="{kind}" cx="[\d.]+" cy="([\d.]+)"', drawn)]


def test_the_more_is_lost_the_higher_the_dot() -> None:
    layers = [
        LayerDamage(layer=0, plain=0.1, kept=0.05, refitted=True),
        LayerDamage(layer=1, plain=0.4, kept=0.2, refitted=True),
    ]
    drawn = damage(layers)
    assert "layer 1: 20.00 %, with CAMERA's choice alone 40.00 %" in drawn
    weak, strong = heights(drawn, "dot")
    assert weak > strong  # downwards
    assert "nan" not in damage([LayerDamage(layer=0, plain=0.0, kept=0.0, refitted=False)])


def test_what_a_name_holds_is_escaped() -> None:
    chart = Chart("<b>", 10)
    chart.text(1, 2.5, "<b>&", '"><script>')
    assert "<b>" not in chart.svg()
    assert "<script" not in chart.svg()
    assert ">&lt;b&gt;&amp;</text>" in chart.svg()


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (4.6, 12.9, [6, 8, 10, 12]),
        (3, 3, [2.8, 3, 3.2]),
        (0, 0, [0, 0.2, 0.4, 0.6, 0.8, 1]),
    ],
)
def test_ticks_are_round_and_inside(low: float, high: float, ticks: list[float]) -> None:
    assert Scale(low, high, 0, 1).ticks() == ticks


def test_ticks_of_a_log_scale_are_few_and_inside() -> None:
    assert Scale(7, 500, 0, 1, log=True).ticks() == [10, 20, 50, 100, 200, 500]
    assert Scale(1.5, 8, 0, 1, log=True).ticks() == [2, 5]
    assert len(Scale(1e-30, 1e30, 0, 1, log=True).ticks()) <= 7


def test_powers_of_ten_are_short() -> None:
    assert ">10¹²<" in importance_curves([layer(0, 1e14, 1e4)], None)
