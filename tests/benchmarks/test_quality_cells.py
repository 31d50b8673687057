"""One cell from end to end on a tiny model, and the file that keeps cells."""

from pathlib import Path

import pytest
import torch
from quality_cells import DENSE, Cell, Laboratory, Settings, Store
from quality_subjects import OWN, Subject

from camera.checkpoints.checkpoint import Checkpoint
from camera.errors import CameraError
from tests.tiny import tiny_checkpoint

SETTINGS = Settings(samples=6, length=16, windows=4, items=2, propagate="sequential")
CELL = Cell("tiny", "wanda-sp", 0.4, 1)


def subject(folder: Path, calibration: str | None = None) -> Subject:
    checkpoint = Checkpoint.open(tiny_checkpoint(folder / "model"))
    words = ["ship", "sea", "light", "storm", "gull", "crab", "harbour", "rock"]
    held_out = " ".join(words[n * n % 8] + str(n) for n in range(200))
    text = calibration or " ".join(words[n * 3 % 8] + str(n + 500) for n in range(400))
    return Subject("tiny", checkpoint, 8, text, {OWN: held_out}, {OWN: "made up"}, {})


@pytest.fixture
def no_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMERA_SHARED_DATA", str(tmp_path / "absent"))


@pytest.mark.usefixtures("no_tasks")
def test_a_cell_is_measured_against_the_dense_model(tmp_path: Path) -> None:
    laboratory = Laboratory(subject(tmp_path), SETTINGS)
    dense = laboratory.measure(Cell("tiny", DENSE, 0.0, 0))
    result = laboratory.measure(CELL)
    assert (dense["width"], result["width"]) == (192, 120)
    assert dense["texts"][OWN]["divergence"] == 0
    assert result["texts"][OWN]["divergence"] > 0
    assert result == laboratory.measure(CELL) | {"seconds": result["seconds"]}


@pytest.mark.usefixtures("no_tasks")
def test_calibration_on_what_is_measured_is_refused(tmp_path: Path) -> None:
    honest = subject(tmp_path)
    leaking = subject(tmp_path, calibration=honest.held_out[OWN])
    with pytest.raises(CameraError, match="share no 13 words"):
        Laboratory(leaking, Settings(6, 256, 1, 2, "sequential")).measure(CELL)


@pytest.mark.usefixtures("no_tasks")
def test_a_kept_cell_is_found_by_another_run_and_not_with_other_settings(tmp_path: Path) -> None:
    laboratory = Laboratory(subject(tmp_path), SETTINGS)
    path = tmp_path / "cells.jsonl"
    kept = Store(path).add(CELL, laboratory, {"texts": {}, "tasks": {}, "width": 120})
    assert Store(path).find(CELL, laboratory) == kept
    assert Store(path).find(Cell("tiny", "wanda-sp", 0.4, 2), laboratory) is None
    others = Settings(samples=7, length=16, windows=4, items=2, propagate="sequential")
    assert Store(path).find(CELL, Laboratory(laboratory.subject, others)) is None
    torch.manual_seed(0)
    changed = Laboratory(
        Subject(
            "tiny", Checkpoint.open(tiny_checkpoint(tmp_path / "other", seed=9)), 8, "", {OWN: ""}, {}, {}
        ),
        SETTINGS,
    )
    assert Store(path).find(CELL, changed) is None


@pytest.mark.usefixtures("no_tasks")
def test_a_line_cut_short_by_a_kill_is_measured_again_and_any_other_damage_refused(tmp_path: Path) -> None:
    laboratory = Laboratory(subject(tmp_path), SETTINGS)
    path = tmp_path / "cells.jsonl"
    Store(path).add(CELL, laboratory, {"width": 1})
    whole = path.read_text()
    path.write_text(whole + whole[:40])
    store = Store(path)
    assert store.find(CELL, laboratory) is not None
    later = Cell("tiny", "flap", 0.4, 1)
    store.add(later, laboratory, {"width": 2})
    assert Store(path).find(later, laboratory) is not None
    path.write_text("nonsense\n" + whole)
    with pytest.raises(CameraError, match="line 1 is not a cell"):
        Store(path)
