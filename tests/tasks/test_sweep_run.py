"""Sweeps for real: what members share is made once, a failure is a row, a stopped sweep goes on."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from camera.errors import CameraError
from tasks.pipeline import build_pipeline
from tasks.project import Project
from tasks.recipe import Recipe
from tasks.run import hold_to_the_gate, run_pipeline
from tasks.sources import find_sources
from tasks.stage import Request, perform
from tasks.store import Artifact, Store
from tasks.sweep import Member, load_sweep
from tasks.sweep_run import SweepFailed, SweepOutcome, hold_to_its_members, run_sweep
from tests.tasks.conftest import MakeRecipe, Quiet


class Sweeping:
    """Sweeps of the tiny recipe in one store, and what ran in each."""

    def __init__(self, recipe: MakeRecipe, folder: Path, experiment: str) -> None:
        self.project = Project(folder / "home")
        self.published = folder / "published"
        self._recipe, self._folder, self._experiment = recipe, folder, experiment

    def run(
        self,
        sweep: dict[str, Any],
        before: Callable[[str, str], None] = lambda member, step: None,
        *,
        tracked: bool = False,
        **sections: Any,
    ) -> tuple[SweepOutcome, Counter[str]]:
        """Run a sweep; its outcome, and how often each step ran. `before` is told of each member's steps."""
        content = self._recipe(
            capture={"propagate": "one-shot"},
            evaluate={"window": 16, "max_windows": 1},
            tracking={"enabled": tracked, "experiment": self._experiment},
            **sections,
        ).model_dump(mode="json")
        path = self._folder / "sweep.yaml"
        path.write_text(yaml.safe_dump({**content, "sweep": sweep}), encoding="utf-8")
        store, ran = Store(self.project.store), Counter[str]()

        def run_member(member: Member, checked: Recipe) -> None:
            def direct(request: Request) -> tuple[Artifact, bool]:
                before(member.name, request.step)
                made: list[str] = []
                artifact = perform(store, request, started=lambda: made.append(request.step))
                ran.update(made)
                return artifact, not made

            pipeline = build_pipeline(checked, find_sources(checked))
            hold_to_the_gate(run_pipeline(pipeline, direct, self.project, Quiet()))

        outcome = run_sweep(load_sweep(path), run_member, self.project, lambda member, line: None)
        return outcome, ran


@pytest.fixture
def sweeping(recipe: MakeRecipe, tmp_path: Path, request: pytest.FixtureRequest) -> Sweeping:
    return Sweeping(recipe, tmp_path, request.node.name)


def client() -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient()


@pytest.mark.slow
def test_one_capture_serves_every_ratio_and_the_next_sweep_runs_nothing(sweeping: Sweeping) -> None:
    lists = {"ratios": [0.35, 0.7]}
    outcome, ran = sweeping.run(lists)
    assert hold_to_its_members(outcome) is outcome
    once = ("capture", "score", "quantize baseline", "convert baseline", "evaluate original story")
    assert {step: ran[step] for step in once} == dict.fromkeys(once, 1)
    assert (ran["prune"], ran["save"], ran["quantize"], ran["report"]) == (2, 2, 2, 2)
    assert len(list(sweeping.project.store.glob("capture/*/manifest.json"))) == 1
    assert [row.label for row in outcome.results.rows] == ["p35", "p70"]
    assert all(row.model is not None and row.model.perplexity for row in outcome.results.rows)
    assert not sweeping.published.exists(), "a sweep publishes only what it is asked to"
    again, ran = sweeping.run(lists)
    assert not ran
    assert again.report == outcome.report


@pytest.mark.slow
def test_a_member_that_fails_is_a_row_and_the_others_go_on(database: str, sweeping: Sweeping) -> None:
    def fail(member: str, step: str) -> None:
        if member == "tiny-p35" and step == "save":
            raise CameraError("the disk is full")

    lists = {"ratios": [0.05, 0.35, 0.7]}
    outcome, _ = sweeping.run(lists, fail, tracked=True)
    with pytest.raises(SweepFailed, match=r"2 of 3 members failed:\n[\s\S]*tiny-p35: the disk is full"):
        hold_to_its_members(outcome)
    reasons = {row.name: row.failure for row in outcome.results.rows}
    assert "nothing would be pruned" in str(reasons["tiny-p5"])
    assert reasons["tiny-p70"] is None
    assert client().get_run(outcome.mlflow_run).info.status == "FAILED"

    mended, ran = sweeping.run(lists, tracked=True)
    assert mended.failed == 1
    assert mended.mlflow_run == outcome.mlflow_run
    assert not {"capture", "score", "prune"} & set(ran), "what was done is not done again"
    assert ran["save"] == 1


@pytest.mark.slow
def test_a_stopped_sweep_goes_on_in_the_same_run_with_its_members_below_it(
    database: str, sweeping: Sweeping
) -> None:
    def stop(member: str, step: str) -> None:
        if member == "tiny-p70" and step == "quantize":
            raise KeyboardInterrupt

    lists = {"ratios": [0.35, 0.7]}
    with pytest.raises(KeyboardInterrupt):
        sweeping.run(lists, stop, tracked=True)
    experiment = client().get_experiment_by_name(sweeping._experiment).experiment_id
    statuses = {run.info.run_name: run.info.status for run in client().search_runs([experiment])}
    assert statuses == {"tiny": "KILLED", "tiny-p35": "FINISHED", "tiny-p70": "KILLED"}

    outcome, ran = sweeping.run(lists, tracked=True)
    assert not outcome.failed
    assert set(ran) == {
        "quantize", "convert", "evaluate pruned story", "evaluate pruned+quantized story", "benchmark", "report",
    }  # fmt: skip
    assert set(ran.values()) == {1}
    runs = {run.info.run_name: run for run in client().search_runs([experiment])}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert set(runs) == {"tiny", "tiny-p35", "tiny-p70"}
    parent = runs.pop("tiny")
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent.info.run_id}
    files = [file.path for file in client().list_artifacts(parent.info.run_id)]
    assert sorted(files) == ["sweep.csv", "sweep.html", "sweep.json"]
    assert parent.data.metrics["members"] == 2


@pytest.mark.slow
def test_the_best_is_the_smallest_that_meets_the_gate_and_it_alone_is_published(sweeping: Sweeping) -> None:
    lists = {"types": ["q8_0", "q4_0"], "publish": "best"}
    outcome, _ = sweeping.run(lists, publish={"require": {"perplexity_increase": 1000}})
    assert hold_to_its_members(outcome) is outcome
    assert list(outcome.published) == ["tiny-q4_0"]
    assert [path.name for path in sweeping.published.iterdir()] == ["tiny-q4_0"]

    outcome, _ = sweeping.run(lists, publish={"require": {"perplexity_increase": -0.99}})
    assert outcome.failed == 0, "to fail the gate is a result"
    assert {row.gate for row in outcome.results.rows} == {"failed"}
    with pytest.raises(SweepFailed, match=r"no member meets publish.require"):
        hold_to_its_members(outcome)


@pytest.mark.slow
def test_members_in_threads_make_what_they_share_once_and_publish_one_after_the_other(
    sweeping: Sweeping,
) -> None:
    outcome, ran = sweeping.run({"ratios": [0.35, 0.7], "publish": "all", "workers": 2})
    assert not outcome.failed
    assert (ran["capture"], ran["score"], ran["convert baseline"], ran["prune"]) == (1, 1, 1, 2)
    assert sorted(outcome.published) == ["tiny-p35", "tiny-p70"]
    assert sorted(path.name for path in sweeping.published.iterdir()) == ["tiny-p35", "tiny-p70"]
