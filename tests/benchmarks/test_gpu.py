"""The accelerator benchmark runs where there is none: the same parts at small shapes on the CPU."""

from pathlib import Path

import gpu
import gpu_parts
import pytest


@pytest.mark.parametrize("part", gpu_parts.PARTS)
def test_every_part_gives_figures(part: str, tmp_path: Path) -> None:
    job = gpu_parts.Job("cpu", **{**gpu_parts.TINY, "repeats": 1})
    rows = gpu_parts.PARTS[part](job, tmp_path)
    assert rows
    assert {row.part for row in rows} == {part}
    assert all(row.value is not None and row.value >= 0 for row in rows), rows


def test_a_part_that_fails_is_a_row_that_says_why(tmp_path: Path) -> None:
    job = gpu_parts.Job("cpu", **{**gpu_parts.TINY, "heads": 5})
    [row] = gpu.measure(job, ["pruning"], tmp_path)
    assert row.value is None
    assert "size of tensor" in row.note
