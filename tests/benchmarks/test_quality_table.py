"""From cells to rows: spreads over seeds, paired differences, shares recovered, goals."""

from math import exp
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest
from quality_methods import BASELINE
from quality_plot import draw
from quality_subjects import OTHER, OWN, Subject
from quality_table import best_method, goals_of, rows_of, table_of

from camera.checkpoints.checkpoint import Checkpoint
from tests.tiny import tiny_checkpoint


def cell(method: str, seed: int, own: float, other: float = 5.0, answers: str = "1100") -> dict[str, Any]:
    return {
        "method": method,
        "ratio": 0.4,
        "seed": seed,
        "width": 96,
        "texts": {OWN: {"loss": own, "divergence": own / 10}, OTHER: {"loss": other, "divergence": 0.1}},
        "tasks": {"piqa": answers},
    }


DENSE = cell("dense", 0, 3.0, 4.0)
PLAIN = [cell(BASELINE, 0, 3.4), cell(BASELINE, 1, 3.5)]


def test_the_share_recovered_is_of_the_loss_at_the_same_seed() -> None:
    rows = rows_of("m", DENSE, [*PLAIN, cell("refit", 0, 3.1, 4.75), cell("refit", 1, 3.25, 4.75)])
    (refit,) = [row for row in rows if row.method == "refit"]
    own = refit.recovered[OWN]
    assert own is not None
    assert own.mean == pytest.approx((0.75 + 0.5) / 2)
    assert own.spread == pytest.approx(stdev([0.75, 0.5]))
    assert refit.recovered[OTHER].mean == pytest.approx(0.25)  # type: ignore[union-attr]
    assert refit.perplexity[OWN].mean == pytest.approx((exp(3.1) + exp(3.25)) / 2)


def test_no_share_is_given_where_camera_p_loses_next_to_nothing() -> None:
    plain = [cell(BASELINE, 0, 3.4, 4.001)]
    rows = rows_of("m", DENSE, [*plain, cell("refit", 0, 3.1, 4.0)])
    assert rows[-1].recovered[OTHER] is None


def test_a_method_without_seeds_is_paired_with_every_seed_of_camera_p() -> None:
    rows = rows_of("m", DENSE, [*PLAIN, cell("weight norm", 0, 3.8)])
    (row,) = [row for row in rows if row.method == "weight norm"]
    assert row.recovered[OWN].mean == pytest.approx((-1.0 - 0.6) / 2)  # type: ignore[union-attr]
    assert row.seeds == 1


def test_task_differences_are_paired_by_item() -> None:
    plain = [cell(BASELINE, 0, 3.4, answers="1100"), cell(BASELINE, 1, 3.5, answers="1110")]
    ours = [cell("refit", 0, 3.1, answers="1000"), cell("refit", 1, 3.1, answers="1000")]
    rows = rows_of("m", DENSE, [*plain, *ours])
    piqa = rows[-1].tasks["piqa"]
    differences = [0.0, -1.0, -0.5, 0.0]
    assert piqa.share == 0.25
    assert piqa.against_baseline == pytest.approx(sum(differences) / 4)
    assert piqa.against_error == pytest.approx(stdev(differences) / 2)
    assert not piqa.worse


def test_a_task_is_worse_beyond_two_standard_errors() -> None:
    plain, ours = (
        cell(BASELINE, 0, 3.4, answers="1" * 100),
        cell("refit", 0, 3.1, answers="1" * 80 + "0" * 20),
    )
    dense = cell("dense", 0, 3.0, 4.0, answers="1" * 100)
    assert rows_of("m", dense, [plain, ours])[-1].tasks["piqa"].worse


def test_only_seeds_and_tasks_that_camera_p_has_too_are_compared() -> None:
    without = cell("refit", 1, 3.25) | {"tasks": {}}
    rows = rows_of("m", DENSE, [*PLAIN, cell("refit", 0, 3.1), without, cell("refit", 7, 9.9)])
    assert rows[-1].seeds == 2
    assert rows[-1].tasks == {}
    assert rows_of("m", DENSE, [cell("refit", 0, 3.1)]) == []


def test_the_best_method_is_one_for_all_models_and_measured_on_all() -> None:
    first = rows_of("a", DENSE, [PLAIN[0], cell("refit", 0, 3.2), cell("obs", 0, 3.1)])
    assert best_method(first) == "obs"
    second = rows_of("b", DENSE, [PLAIN[0], cell("refit", 0, 3.2)])
    assert best_method([*first, *second]) == "refit"
    assert best_method(rows_of("a", DENSE, PLAIN)) is None


def test_a_goal_is_missed_below_its_share_or_with_a_task_that_is_worse(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path / "model"))
    subject = Subject("m", checkpoint, 8, "", {}, {}, {0.4: 0.6})

    def met(own: float, answers: str) -> bool | None:
        rows = rows_of("m", dense, [plain, cell("refit", 0, own, answers=answers)])
        return next(goal.met for goal in goals_of([subject], rows, "refit") if goal.corpus == OWN)

    dense = cell("dense", 0, 3.0, 4.0, "1" * 50)
    plain = cell(BASELINE, 0, 3.4, answers="1" * 50)
    assert met(3.1, "1" * 50) is True
    assert met(3.2, "1" * 50) is False
    assert met(3.1, "1" * 25 + "0" * 25) is False


def test_table_and_picture_show_every_row(tmp_path: Path) -> None:
    rows = rows_of("m", DENSE, [*PLAIN, cell("refit", 0, 3.1), cell("refit", 1, 3.2)])
    without_tasks = DENSE | {"tasks": {}}
    assert table_of({"m": DENSE, "n": without_tasks}, rows, markdown=True).row_count == 2 + 2
    draw(rows, {"m": {OWN: "one", OTHER: "two"}}, tmp_path / "plots" / "quality.png")
    assert (tmp_path / "plots" / "quality.png").read_bytes().startswith(b"\x89PNG")
