"""The quality gate: what is good enough is published, what is not is kept, marked and explained."""

from pathlib import Path
from typing import Any

import pytest

from camera.errors import CameraError
from camera.files import read_json
from camera.report.schema import Accuracy, Change, ModelRow, Perplexity, Results, read_results
from tasks.gate import check_requirements, judge
from tasks.pipeline import Pipeline, build_pipeline
from tasks.project import Project
from tasks.recipe import RequireOptions
from tasks.run import GateFailed, Outcome, hold_to_the_gate, run_pipeline
from tasks.sources import find_sources
from tasks.stage import Request, find, perform
from tasks.store import Artifact, Store
from tests.tasks.conftest import MakeRecipe, Quiet


def results(**change: float | None) -> Results:
    """Results of a model whose perplexity changed so on each text."""
    texts = {
        text: Perplexity(value=10, change=value, tokens=1, window=1, dtype="float32")
        for text, value in change.items()
    }
    return Results(
        name="x", base_model="x", model_type="llama", layers=1, hidden_size=1, recipe={},
        models=(ModelRow(id="pruned+quantized", title="pruned, q4_0", perplexity=texts),),
    )  # fmt: skip


def test_a_model_within_its_limits_passes_and_the_limit_itself_is_within() -> None:
    gate = judge(results(a=0.3, b=-0.1), RequireOptions(perplexity_increase=0.3))
    assert gate.verdict == "passed"
    assert gate.reasons == ()
    assert [requirement.of for requirement in gate.requirements] == ["a", "b"]


def test_a_number_holds_for_every_text_and_a_name_overrules_it() -> None:
    found = results(a=0.25, b=0.5)
    assert not judge(found, RequireOptions(perplexity_increase=0.3)).passed
    assert judge(found, RequireOptions(perplexity_increase={"*": 0.3, "b": 0.6})).passed
    assert judge(found, RequireOptions(perplexity_increase={"a": 0.3})).passed


def test_the_reason_says_which_requirement_failed_and_by_how_much() -> None:
    gate = judge(results(a=0.5, b=0.1), RequireOptions(perplexity_increase=0.3))
    assert gate.reasons == ("perplexity_increase on a: +50.0 %, at most +30.0 % allowed, 20 points too much",)


@pytest.mark.parametrize("change", [None, float("nan"), float("inf")])
def test_what_was_not_measured_or_is_no_number_meets_no_requirement(change: float | None) -> None:
    assert not judge(results(a=change), RequireOptions(perplexity_increase=0.3)).passed


@pytest.mark.parametrize(
    ("require", "words"),
    [
        ({}, "requires nothing"),
        ({"perplexity_increase": "much"}, r"perplexity_increase\.\*: .*valid number"),
        ({"perplexity_increase": -1.5}, "greater than -1"),
        ({"perplexity_increase": float("inf")}, "finite"),
        ({"perplexity": 0.3}, "no such field; known here: perplexity_increase, task_drop"),
    ],
)
def test_a_gate_that_says_nothing_of_use_is_refused_with_its_path(
    recipe: MakeRecipe, require: dict[str, Any], words: str
) -> None:
    with pytest.raises(CameraError, match=rf"publish\.require.*{words}"):
        recipe(publish={"require": require})


def test_a_text_that_is_not_evaluated_is_refused_before_anything_runs(recipe: MakeRecipe) -> None:
    checked = recipe(publish={"require": {"perplexity_increase": {"wikitext2-test": 0.3}}})
    with pytest.raises(CameraError, match=r"perplexity_increase\.wikitext2-test: .*there are: story"):
        build_pipeline(checked, find_sources(checked))


class Gated:
    """Runs of one recipe with one gate after the other."""

    def __init__(self, recipe: MakeRecipe, store: Store, folder: Path, experiment: str) -> None:
        self.published = folder / "published" / "tiny"
        self._recipe, self._store, self._project = recipe, store, Project(folder / "home")
        self._experiment = experiment

    def pipeline(self, limit: float | None) -> Pipeline:
        require = None if limit is None else {"perplexity_increase": limit}
        checked = self._recipe(
            evaluate={"window": 16, "max_windows": 1},
            tracking={"enabled": True, "experiment": self._experiment},
            publish={"require": require},
        )
        return build_pipeline(checked, find_sources(checked))

    def run(self, limit: float | None) -> Outcome:
        def direct(request: Request) -> tuple[Artifact, bool]:
            cached = find(self._store, request) is not None
            return perform(self._store, request), cached

        return run_pipeline(self.pipeline(limit), direct, self._project, Quiet())


def test_a_model_that_fails_is_kept_and_marked_and_a_looser_gate_publishes_it_from_the_store(
    monkeypatch: pytest.MonkeyPatch,
    recipe: MakeRecipe,
    store: Store,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'own.db'}")  # a registry of its own
    gated, client = Gated(recipe, store, tmp_path, request.node.name), MlflowClient()
    failed = gated.run(-0.99)
    with pytest.raises(GateFailed, match=r"perplexity_increase on story: .* points too much"):
        hold_to_the_gate(failed)
    assert failed.published is None
    assert not gated.published.exists()
    assert not client.search_registered_models()
    tags = client.get_run(str(failed.mlflow_run)).data.tags
    assert tags["gate"] == "failed"
    assert tags["gate.reasons"].startswith("perplexity_increase on story: ")
    marked = read_results(failed.report.with_name("results.json")).gate
    assert marked is not None
    assert marked.reasons[0] in failed.report.read_text(encoding="utf-8").replace("&#43;", "+")
    kept = failed.artifacts["publish"].path
    assert read_json(kept / "published.json")["withheld"] == list(marked.reasons)
    assert "fails the quality gate" in (kept / "README.md").read_text(encoding="utf-8")
    assert gated.run(-0.99).executed == []

    passed = gated.run(1e9)
    assert passed.executed == ["report", "publish"]
    assert hold_to_the_gate(passed) is passed
    assert passed.published is not None
    assert (gated.published / "model.safetensors").is_file()
    assert "fails the quality gate" not in (gated.published / "README.md").read_text(encoding="utf-8")
    assert client.get_run(str(passed.mlflow_run)).data.tags["gate"] == "passed"
    assert [model.name for model in client.search_registered_models()] == ["tiny"]


def test_a_gate_changes_no_key_but_those_of_report_and_publication(
    recipe: MakeRecipe, store: Store, tmp_path: Path
) -> None:
    gated = Gated(recipe, store, tmp_path, "keys")
    without, tight = gated.pipeline(None), gated.pipeline(0.1)
    before = {step.name: (step.options.identity(), step.inputs) for step in without.steps}
    after = {step.name: (step.options.identity(), step.inputs) for step in tight.steps}
    assert {name for name in before if before[name] != after[name]} == {"report"}, "publish reads the report"


def with_tasks(difference: float | None) -> Results:
    change = (
        None if difference is None else Change(difference=difference, standard_error=0.01, gained=0, lost=0)
    )
    found = results(a=0.1)
    average = {"acc": Accuracy(value=0.5, standard_error=0.01, change=change)}
    return found.model_copy(
        update={"models": (found.models[0].model_copy(update={"task_average": average}),)}
    )


def test_the_average_over_tasks_may_drop_by_so_many_points() -> None:
    assert judge(with_tasks(-0.02), RequireOptions(task_drop=2.5)).passed
    assert judge(with_tasks(0.01), RequireOptions(task_drop=0)).passed
    failed = judge(with_tasks(-0.03), RequireOptions(task_drop=2.5))
    assert failed.reasons == (
        "task_drop on the tasks: 3.00 points, at most 2.50 points allowed, 0.5 points too much",
    )


def test_tasks_that_were_not_measured_meet_no_requirement() -> None:
    assert not judge(with_tasks(None), RequireOptions(task_drop=2.5)).passed
    assert not judge(results(a=0.1), RequireOptions(task_drop=2.5)).passed


def test_a_requirement_on_tasks_needs_tasks() -> None:
    with pytest.raises(CameraError, match=r"publish\.require\.task_drop: no tasks are measured"):
        check_requirements(RequireOptions(task_drop=1), (), ())
    check_requirements(RequireOptions(task_drop=1), (), ("boolq",))
    check_requirements(RequireOptions(perplexity_increase=1), (), ())
