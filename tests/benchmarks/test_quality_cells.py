"""One cell from end to end on a tiny model, and the file that keeps cells."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from quality_cells import DENSE, TASKS_PART, TEXTS_PART, Cell, Laboratory, Settings, Store
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
    assert laboratory.parts == [TEXTS_PART]
    dense = laboratory.measure(Cell("tiny", DENSE, 0.0, 0), laboratory.parts)
    result = laboratory.measure(CELL, laboratory.parts)
    assert (dense["width"], result["width"]) == (192, 120)
    assert dense["texts"][OWN]["divergence"] == 0
    assert result["texts"][OWN]["divergence"] > 0
    assert result == laboratory.measure(CELL, laboratory.parts) | {"seconds": result["seconds"]}


@pytest.mark.usefixtures("no_tasks")
def test_calibration_on_what_is_measured_is_refused(tmp_path: Path) -> None:
    honest = subject(tmp_path)
    leaking = subject(tmp_path, calibration=honest.held_out[OWN])
    with pytest.raises(CameraError, match="share no 13 words"):
        Laboratory(leaking, Settings(6, 256, 1, 2, "sequential")).measure(CELL, [TEXTS_PART])


def write_tasks(folder: Path) -> None:
    (folder / "tasks").mkdir(parents=True)
    piqa = [{"goal": f"gull {n}", "sol1": "sea", "sol2": "rock", "label": n % 2} for n in range(8)]
    choices = {"text": ["a gull", "a storm", "a ship"], "label": ["A", "B", "C"]}
    arc = [
        {"id": str(n), "question": f"who {n}?", "choices": choices, "answerKey": "ABC"[n % 3]}
        for n in range(8)
    ]
    for name, rows in (("piqa.validation", piqa), ("arc_easy.test", arc)):
        (folder / "tasks" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")


def parts(cells: Path) -> list[str]:
    """Which part each file holds."""
    found = [json.loads(path.read_text()).keys() & {TEXTS_PART, TASKS_PART} for path in cells.glob("*.json")]
    return sorted(name for names in found for name in names)


def test_tasks_are_added_later_without_measuring_the_texts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("CAMERA_SHARED_DATA", str(tmp_path / "shared"))
    write_tasks(tmp_path / "shared")
    path, model = tmp_path / "cells", subject(tmp_path)
    first = Store(path).measured(CELL, Laboratory(model, replace(SETTINGS, items=0)))
    assert first["tasks"] == {}
    both = Store(path).measured(CELL, Laboratory(model, replace(SETTINGS, items=5)))
    assert both["texts"] == first["texts"]
    assert {task: len(answers) for task, answers in both["tasks"].items()} == {"arc_easy": 5, "piqa": 5}
    assert parts(path) == [TASKS_PART, TEXTS_PART]


@pytest.mark.usefixtures("no_tasks")
def test_a_kept_cell_is_found_by_another_run_and_not_with_other_settings_or_weights(tmp_path: Path) -> None:
    model, path = subject(tmp_path), tmp_path / "cells"

    def measured_now(cell: Cell, laboratory: Laboratory) -> bool:
        before = parts(path)
        Store(path).measured(cell, laboratory)
        return parts(path) != before

    assert measured_now(CELL, Laboratory(model, SETTINGS))
    assert not measured_now(CELL, Laboratory(model, SETTINGS))
    assert measured_now(replace(CELL, seed=2), Laboratory(model, SETTINGS))
    assert measured_now(CELL, Laboratory(model, replace(SETTINGS, samples=7)))
    other = Checkpoint.open(tiny_checkpoint(tmp_path / "other", seed=9))
    assert measured_now(CELL, Laboratory(replace(model, checkpoint=other), SETTINGS))


@pytest.mark.usefixtures("no_tasks")
def test_fresh_measures_again_and_the_newest_counts(tmp_path: Path) -> None:
    laboratory, path = Laboratory(subject(tmp_path), SETTINGS), tmp_path / "cells"
    Store(path).measured(CELL, laboratory)
    (kept,) = path.iterdir()
    kept.write_text(kept.read_text().replace('"width": 120', '"width": 1'))
    assert Store(path).measured(CELL, laboratory)["width"] == 1
    assert Store(path, fresh=True).measured(CELL, laboratory)["width"] == 120
    assert Store(path).measured(CELL, laboratory)["width"] == 120
