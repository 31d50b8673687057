"""Tasks in a recipe: a step for each model and task, so that one more task measures only itself."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from camera.errors import CameraError
from camera.evaluation.tasks import evaluate_tasks, read_task_result
from tasks.pipeline import Pipeline, build_pipeline
from tasks.sources import find_sources
from tasks.stage import Input, perform
from tasks.stages import evaluate_task
from tasks.stages.fetch import TextOptions
from tasks.stages.report import ReportOptions
from tasks.store import Store
from tests.camera.evaluation.conftest import arc_rows, boolq_rows, write_rows
from tests.tasks.conftest import MakeRecipe
from tests.tasks.test_pipeline import build, keys, names

MODELS = ("original", "baseline", "pruned", "pruned+quantized")


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    folder = tmp_path / "documents"
    folder.mkdir()
    write_rows(folder / "arc_easy.test.jsonl", arc_rows(4))
    write_rows(folder / "boolq.validation.jsonl", boolq_rows(4))
    return folder


def with_tasks(recipe: MakeRecipe, documents: Path, *tasks: str, **options: Any) -> Pipeline:
    return build(recipe(evaluate={"tasks": list(tasks), "task_folder": str(documents), **options}))


def task_keys(pipeline: Pipeline) -> dict[str, str]:
    return {name: key for name, key in keys(pipeline).items() if name.startswith("task ")}


def test_each_task_is_a_step_for_each_of_the_four_models(recipe: MakeRecipe, documents: Path) -> None:
    found = [
        name for name in names(with_tasks(recipe, documents, "boolq", "arc_easy")) if name.startswith("task ")
    ]
    assert found == [f"task {model} {task}" for task in ("boolq", "arc_easy") for model in MODELS]


def test_one_more_task_leaves_the_keys_of_the_others(recipe: MakeRecipe, documents: Path) -> None:
    before = keys(with_tasks(recipe, documents, "boolq"))
    after = keys(with_tasks(recipe, documents, "arc_easy", "boolq"))
    assert {name for name in before if before[name] != after[name]} == {"report", "publish"}
    assert set(after) - set(before) == {f"task {model} arc_easy" for model in MODELS}


def test_a_recipe_without_tasks_asks_for_what_it_did_before_there_were_tasks(recipe: MakeRecipe) -> None:
    pipeline = build(recipe())
    steps = {step.name: step for step in pipeline.steps}
    asked = steps["evaluate original story"].options.identity()["evaluate"]
    assert set(asked) == {"window", "max_windows", "dtype", "dataset"}
    described = steps["report"].options.of(ReportOptions).recipe["evaluate"]
    assert not {"tasks", "few_shot", "limit", "task_folder"} & set(described)
    assert steps["fetch story"].options.of(TextOptions).window is None


@pytest.mark.parametrize(("option", "value"), [("few_shot", 2), ("limit", 3), ("dtype", "float32")])
def test_what_decides_the_result_decides_the_key(
    recipe: MakeRecipe, documents: Path, option: str, value: Any
) -> None:
    before = task_keys(with_tasks(recipe, documents, "boolq"))
    after = task_keys(with_tasks(recipe, documents, "boolq", **{option: value}))
    assert all(before[name] != after[name] for name in before)


def test_the_batch_size_and_the_place_of_the_files_decide_nothing(
    recipe: MakeRecipe, documents: Path, tmp_path: Path
) -> None:
    elsewhere = Path(shutil.copytree(documents, tmp_path / "elsewhere"))
    before = task_keys(with_tasks(recipe, documents, "boolq"))
    assert task_keys(with_tasks(recipe, elsewhere, "boolq", batch_size=3)) == before


def test_another_document_asks_its_own_task_again_and_no_other(recipe: MakeRecipe, documents: Path) -> None:
    before = task_keys(with_tasks(recipe, documents, "boolq", "arc_easy"))
    write_rows(documents / "boolq.validation.jsonl", boolq_rows(5))
    after = task_keys(with_tasks(recipe, documents, "boolq", "arc_easy"))
    assert {name.split()[-1] for name in before if before[name] != after[name]} == {"boolq"}


def test_perplexity_does_not_change_with_tasks(recipe: MakeRecipe, documents: Path) -> None:
    before, after = keys(build(recipe())), keys(with_tasks(recipe, documents, "boolq"))
    assert {name for name in before if before[name] != after[name]} == {"report", "publish"}


def test_a_missing_file_is_named_before_anything_runs(recipe: MakeRecipe, documents: Path) -> None:
    with pytest.raises(CameraError, match=r"piqa\.validation\.jsonl is missing"):
        with_tasks(recipe, documents, "piqa")


def test_c4_is_cut_for_the_window_that_it_is_measured_in(recipe: MakeRecipe) -> None:
    def fetched(window: int) -> TextOptions:
        datasets = [{"name": "c4", "split": "test"}]
        pipeline = build(recipe(evaluate={"datasets": datasets, "window": window}))
        return next(step.options.of(TextOptions) for step in pipeline.steps if step.name == "fetch c4-test")

    assert fetched(64).window == 64
    assert fetched(64) != fetched(128)


def test_the_stage_writes_what_the_library_measures(
    recipe: MakeRecipe, documents: Path, model: Path, store: Store
) -> None:
    asked = recipe(evaluate={"tasks": ["arc_easy"], "task_folder": str(documents), "limit": 3})
    sources = find_sources(asked)
    step = next(s for s in build_pipeline(asked, sources).steps if s.name == "task original arc_easy")
    assert all(isinstance(given, Input) for given in step.inputs.values())
    seen: list[tuple[int, int]] = []
    artifact = perform(store, step.request({}), lambda *counts: seen.append(counts))
    result = read_task_result(artifact.path / evaluate_task.RESULT)
    expected = evaluate_tasks(model, ["arc_easy"], task_folder=documents, limit=3, device="cpu")["arc_easy"]
    assert result == expected
    assert seen[-1] == (12, 12)
    assert artifact.metrics == {
        "documents": 3,
        "acc": expected.metrics["acc"].value,
        "acc_standard_error": expected.metrics["acc"].standard_error,
        "acc_norm": expected.metrics["acc_norm"].value,
        "acc_norm_standard_error": expected.metrics["acc_norm"].standard_error,
    }
