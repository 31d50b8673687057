"""Accuracy on tasks in every output, from real answers of real (tiny) models."""

import csv
import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from camera.evaluation.paired import paired
from camera.evaluation.tasks import TaskResult, evaluate_tasks, read_task_result
from camera.files import write_json
from camera.report.card import CardFacts, render_card
from camera.report.html import flat_rows, render_html, write_report
from camera.report.schema import MODEL_IDS, ModelId, Results, read_results
from camera.report.scores import score_task
from camera.report.table import grids, results_markdown, results_table, task_grid
from camera.report.words import accuracy_words, points_words, verdict
from tests.camera.evaluation.conftest import arc_rows, boolq_rows, write_rows
from tests.camera.report.conftest import TEXT, Run

TASKS = ("boolq", "arc_easy")
PARTS: Mapping[ModelId, str] = {
    "baseline": "quantized/baseline",
    "pruned": "saved",
    "pruned+quantized": "quantized",
}


@pytest.fixture(scope="module")
def answered(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run, with two tasks measured on all four models."""
    root = tmp_path_factory.mktemp("answered")
    write_rows(root / "boolq.validation.jsonl", boolq_rows(24))
    write_rows(root / "arc_easy.test.jsonl", arc_rows(60))
    folders = dict(run.folders)
    for model in MODEL_IDS:
        place = run.source.folder if model == "original" else run.folders[PARTS[model]]
        found = evaluate_tasks(place, TASKS, task_folder=root, dtype="float32", device="cpu", batch_size=16)
        for task, result in found.items():
            folders[f"task/{model}/{task}"] = root / model / task
            write_json(root / model / task / "task.json", result.model_dump(mode="json"))
    return replace(run, folders=folders)


@pytest.fixture(scope="module")
def results(answered: Run) -> Results:
    return answered.results()


def result_of(run: Run, model: str, task: str) -> TaskResult:
    return read_task_result(run.folders[f"task/{model}/{task}"] / "task.json")


def terminal(results: Results) -> list[str]:
    console = Console(width=100, force_terminal=False)
    with console.capture() as captured:
        console.print(results_table(results))
    return captured.get().splitlines()


def test_every_model_has_its_accuracy_and_its_difference_in_pairs(answered: Run, results: Results) -> None:
    for row in results.models:
        for task in TASKS:
            mine, original = result_of(answered, row.id, task), result_of(answered, "original", task)
            for name, score in row.tasks[task].metrics.items():
                assert score.value == mine.metrics[name].value
                assert score.standard_error == mine.metrics[name].standard_error
                if row.id == "original":
                    assert score.change is None
                    continue
                assert score.change is not None
                expected = paired(original.metrics[name].of_documents, mine.metrics[name].of_documents)
                assert vars(score.change) == vars(expected)
    assert any(
        score.change.gained + score.change.lost
        for row in results.models
        for task in row.tasks.values()
        for score in task.metrics.values()
        if score.change
    )


def test_the_average_weighs_tasks_alike_and_takes_the_normalised_metric_where_there_is_one(
    results: Results,
) -> None:
    row = results.row("pruned")
    assert row is not None
    boolq, arc = (row.tasks[task].metrics for task in TASKS)
    assert row.task_average["acc"].value == pytest.approx((boolq["acc"].value + arc["acc"].value) / 2)
    assert row.task_average["acc_norm"].value == pytest.approx(
        (boolq["acc"].value + arc["acc_norm"].value) / 2
    )
    change = row.task_average["acc"].change
    assert change is not None
    assert boolq["acc"].change is not None
    assert arc["acc"].change is not None
    assert change.difference == pytest.approx(
        (boolq["acc"].change.difference + arc["acc"].change.difference) / 2
    )
    errors = [boolq["acc"].change.standard_error, arc["acc"].change.standard_error]
    assert change.standard_error == pytest.approx(sum(error**2 for error in errors if error) ** 0.5 / 2)


def test_a_model_that_lacks_a_task_has_no_average(answered: Run) -> None:
    found = answered.results(without=("task/pruned/arc_easy",))
    averages = {row.id: bool(row.task_average) for row in found.models}
    assert averages == {"original": True, "baseline": True, "pruned": False, "pruned+quantized": True}
    grid = task_grid(found)
    assert grid is not None
    cells = {row[0]: row[2 + MODEL_IDS.index("pruned")] for row in grid.rows}
    assert (cells["arc_easy"], cells["average"]) == ("–", "–")
    assert cells["boolq"] != "–"


def test_answers_to_other_questions_are_not_compared(answered: Run) -> None:
    mine, original = (result_of(answered, model, "boolq") for model in ("pruned", "original"))
    other = original.model_copy(update={"prompts": "of other questions"})
    assert score_task(mine, original).metrics["acc"].change is not None
    assert score_task(mine, other).metrics["acc"].change is None


def test_the_table_has_texts_tasks_and_average_down_and_models_across(results: Results) -> None:
    grid = task_grid(results)
    assert grid is not None
    assert grid.columns == ("", "chance", *(row.title for row in results.models))
    assert [row[0] for row in grid.rows] == [
        *(f"perplexity, {TEXT}", "boolq", "arc_easy", "average", "arc_easy, norm", "average, norm"),
    ]
    for row, model in enumerate(results.models):
        assert accuracy_words(model.tasks["boolq"].metrics["acc"]) in grid.rows[1][2 + row]


def test_a_difference_beyond_chance_is_marked_and_explained(results: Results) -> None:
    def with_chance(p_value: float) -> str:
        row = results.row("pruned")
        assert row is not None
        score = row.tasks["boolq"].metrics["acc"]
        assert score.change is not None
        sure = score.model_copy(update={"change": score.change.model_copy(update={"p_value": p_value})})
        task = row.tasks["boolq"].model_copy(update={"metrics": {"acc": sure}})
        changed = row.model_copy(update={"tasks": {"boolq": task}, "task_average": {}})
        grid = task_grid(results.model_copy(update={"models": (changed,)}))
        assert grid is not None
        assert any("McNemar" in note for note in grid.notes) == (p_value < 0.05)
        return next(row[2] for row in grid.rows if row[0] == "boolq").removesuffix(" ↑")

    assert with_chance(0.01).endswith("*")
    assert not with_chance(0.2).endswith("*")


@pytest.mark.parametrize(("right", "marked"), [(10, False), (22, True)])
def test_what_is_above_chance_is_marked_and_explained(answered: Run, right: int, marked: bool) -> None:
    mine = result_of(answered, "original", "boolq")
    answers = (1.0,) * right + (0.0,) * (24 - right)
    acc = mine.metrics["acc"].model_copy(update={"value": right / 24, "of_documents": answers})
    score = score_task(mine.model_copy(update={"metrics": {"acc": acc}, "chance": 0.5}), None)
    row = answered.results().models[0].model_copy(update={"tasks": {"boolq": score}, "task_average": {}})
    grid = task_grid(answered.results().model_copy(update={"models": (row,)}))
    assert grid is not None
    found = next(row for row in grid.rows if row[0] == "boolq")
    assert (found[1], found[2].endswith("↑")) == ("50.0", marked)
    assert any("above chance" in note for note in grid.notes)


def test_what_models_wrote_stands_side_by_side_on_the_page(answered: Run, tmp_path: Path) -> None:
    folders = dict(answered.folders)
    for model, text in (("original", "Paris <b>"), ("pruned", "Berlin")):
        folders[f"sample/{model}"] = tmp_path / model
        folders[f"sample/{model}"].mkdir()
        write_json(tmp_path / model / "samples.json", [{"prompt": "The capital is", "text": text}])
    found = replace(answered, folders=folders).results()
    assert [row.samples.get("The capital is") for row in found.models] == ["Paris <b>", None, "Berlin", None]
    page = render_html(found)
    assert page.index("The capital is") < page.index("Paris &lt;b&gt;") < page.index("Berlin")


def test_the_terminal_keeps_every_row_on_one_line_of_100_columns(results: Results) -> None:
    lines = terminal(results)
    assert max(map(len, lines)) <= 100
    for task in TASKS:
        line = next(line for line in lines if line.strip().startswith(task))
        for row in results.models:
            assert accuracy_words(row.tasks[task].metrics["acc"]) in line


def test_every_output_has_the_table(results: Results) -> None:
    row = results.row("pruned+quantized")
    assert row is not None
    shown = accuracy_words(row.task_average["acc"])
    assert "(" in shown
    page, markdown = render_html(results), results_markdown(results)
    facts = CardFacts(
        name="x", base_model="y", model_type="llama",
        prune={"kept_width": 144, "width": 192, "mode": "physical", "removed_share": 0.25, "method": "camera", "sparsity": 0.0},
    )  # fmt: skip
    for text in (page, markdown, render_card(facts, results)):
        assert "Perplexity and accuracy on tasks" in text
        assert shown in text


def test_the_verdict_and_the_head_of_the_page_name_the_average(results: Results) -> None:
    product = results.product
    assert product is not None
    change = product.task_average["acc"].change
    assert change is not None
    words = f"average of 2 tasks {points_words(change.difference)}"
    assert words in verdict(results)
    assert f"<b>{points_words(change.difference)}</b><span>points, average of 2 tasks</span>" in render_html(
        results
    )


def test_the_spreadsheet_has_every_number_once(results: Results, tmp_path: Path) -> None:
    write_report(results, tmp_path)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text())))
    keys = [(row["model"], row["quantity"], row["of"]) for row in rows]
    assert len(keys) == len(set(keys))
    found = dict(zip(keys, (row["value"] for row in rows), strict=True))
    product = results.product
    assert product is not None
    score = product.tasks["arc_easy"].metrics["acc_norm"]
    assert score.change is not None
    assert float(found[product.title, "acc_norm", "arc_easy"]) == score.value
    assert float(found[product.title, "acc_norm_difference", "arc_easy"]) == score.change.difference
    assert float(found[product.title, "acc_difference_standard_error", "average"]) >= 0
    assert read_results(tmp_path / "results.json") == results


def test_a_run_without_tasks_reads_as_before_there_were_tasks(run: Run) -> None:
    results = run.results()
    assert task_grid(results) is None
    assert len(grids(results)) == 2
    assert all("task" not in field for row in results.model_dump()["models"] for field in row)
    assert not any("acc" in quantity for _, quantity, _, _ in flat_rows(results))
    assert "tasks" not in verdict(results)


@pytest.mark.parametrize(
    ("share", "words"), [(-0.013, "−1.3"), (0.0249, "+2.5"), (0.0001, "0.0"), (-0.0001, "0.0")]
)
def test_points_have_their_sign(share: float, words: str) -> None:
    assert points_words(share) == words


def test_one_task_is_called_by_its_name_and_has_no_row_of_averages(answered: Run) -> None:
    found = answered.results(without=tuple(f"task/{model}/boolq" for model in MODEL_IDS))
    grid = task_grid(found)
    assert grid is not None
    assert not any("average" in row[0] for row in grid.rows)
    assert "accuracy on arc_easy " in verdict(found)
