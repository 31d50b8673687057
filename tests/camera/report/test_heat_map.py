"""The map of importance: one scale for all layers, strong where a micro-expert matters."""

import re

from camera.report.heat_map import importance_map, shaded_rows
from camera.report.schema import LayerImportance, PruneSummary


def layer(number: int, *curve: float) -> LayerImportance:
    return LayerImportance(layer=number, quartiles=(0,) * 5, curve=curve)


def shares(drawn: str) -> list[int]:
    """Shades in the order in which they are drawn, the scale's left out."""
    return [int(share) for share in re.findall(r"--at:(\d+)%", drawn)][:-17]


def test_a_layer_that_matters_more_is_stronger_throughout() -> None:
    weak, strong = layer(0, 1.0, 1.0), layer(1, 1000.0, 1000.0)
    assert shares(importance_map((weak, strong), None)) == [0, 100]


def test_neighbours_of_one_shade_are_one_rectangle() -> None:
    parts = "".join(shaded_rows([[0, 0, 4, 4], [4, 4, 4, 4]], [0, 1], 4))
    assert parts.count("<path") == 2
    assert parts.count("M") == 3


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
