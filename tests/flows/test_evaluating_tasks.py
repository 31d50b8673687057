"""`camera evaluate --tasks`."""

import json
from pathlib import Path

import pytest

from camera.evaluation.paired import paired
from camera.evaluation.tasks import read_task_result
from tests.camera.evaluation.conftest import arc_rows, boolq_rows, write_rows
from tests.flows.conftest import Workplace

HOW = ("--task-folder", "documents", "--dtype", "float32", "--device", "cpu", "--batch-size", "16")


@pytest.fixture
def documents(workplace: Workplace) -> Path:
    folder = workplace.folder / "documents"
    folder.mkdir()
    write_rows(folder / "arc_easy.test.jsonl", arc_rows(30))
    write_rows(folder / "boolq.validation.jsonl", boolq_rows(6))
    return folder


@pytest.mark.slow
def test_tasks_are_compared_with_the_reference_question_by_question(
    workplace: Workplace, documents: Path
) -> None:
    workplace.camera("quantize", "model", "packed", "--type", "q4_0")
    asked = (
        "evaluate",
        "packed",
        "--reference",
        "model",
        "--tasks",
        "arc_easy,boolq",
        "--out",
        "results",
        *HOW,
    )
    found = json.loads(workplace.camera(*asked, "--json").stdout)
    assert set(found) == {"tasks", "reference_tasks"}
    model, original = (
        read_task_result(workplace.folder / "results" / label / "arc_easy.json")
        for label in ("model", "reference")
    )
    for name, score in found["tasks"]["arc_easy"]["metrics"].items():
        expected = paired(original.metrics[name].of_documents, model.metrics[name].of_documents)
        assert score["value"] == model.metrics[name].value
        assert score["change"] == vars(expected)

    times = {path: path.stat().st_mtime_ns for path in (workplace.folder / "results").rglob("*.json")}
    assert len(times) == 4
    (workplace.folder / "results" / "model" / "boolq.json").unlink()
    told = workplace.camera(*asked).stdout
    assert "arc_easy" in told
    assert "gained" in told
    again = {path: path.stat().st_mtime_ns for path in times}
    assert {path.name for path in times if times[path] != again[path]} == {"boolq.json"}


@pytest.mark.slow
def test_perplexity_and_tasks_may_be_asked_for_together(workplace: Workplace, documents: Path) -> None:
    text = ("--text", "held-out.txt", "--window", "64", "--max-windows", "2")
    both = json.loads(workplace.camera("evaluate", "model", *text, "--tasks", "boolq", *HOW, "--json").stdout)
    alone = json.loads(
        workplace.camera("evaluate", "model", *text, "--dtype", "float32", "--device", "cpu", "--json").stdout
    )
    assert both["perplexity"] == pytest.approx(alone["perplexity"])
    assert "tasks" not in alone
    assert both["tasks"]["boolq"]["documents"] == 6


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--tasks", "piqa", "--task-folder", "documents"), "piqa.validation.jsonl is missing"),
        (("--out", "results"), "out goes with tasks"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_exit_code_2(
    workplace: Workplace, documents: Path, flags: tuple[str, ...], words: str
) -> None:
    done = workplace.camera("evaluate", "model", *flags, check=False)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
