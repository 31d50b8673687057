"""The accelerator benchmark runs where there is none: the same parts at small shapes on the CPU."""

from pathlib import Path

import gpu
import pytest


@pytest.mark.parametrize("part", gpu.PARTS)
def test_every_part_gives_figures(part: str, tmp_path: Path) -> None:
    job = gpu.Job("cpu", **{**gpu.TINY, "repeats": 1})
    rows = gpu.PARTS[part](job, tmp_path)
    assert rows
    assert {row.part for row in rows} == {part}
    assert all(row.value is not None and row.value >= 0 for row in rows), rows


def test_the_cpu_keeps_the_channels_that_it_keeps(tmp_path: Path) -> None:
    rows = gpu.same_channels(gpu.Job("cpu", **gpu.TINY), tmp_path)
    assert [(row.value, row.met) for row in rows] == [(100.0, True)] * 2


def test_a_part_that_fails_is_a_row_that_says_why(tmp_path: Path) -> None:
    job = gpu.Job("cpu", **{**gpu.TINY, "heads": 5})
    [row] = gpu.measure(job, ["pruning"], tmp_path)
    assert row.value is None
    assert "size of tensor" in row.note
