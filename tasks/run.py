"""One run of a pipeline: every step in order, told to whoever listens, recorded in MLflow, stopped cleanly."""

import logging
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from camera.disk import DiskError
from camera.errors import CameraError
from camera.files import read_json
from camera.report.gate import Gate
from camera.report.schema import read_results
from camera.units import bytes_text
from tasks.lease import lease
from tasks.pipeline import Pipeline
from tasks.preflight import room_needed
from tasks.project import Project
from tasks.stage import Request, RunReferences, Step
from tasks.stages import fetch, publish, report
from tasks.stages.convert import main_gguf
from tasks.store import Artifact, Store
from tasks.tracking import Tracker
from tasks.walk import walk

_log = logging.getLogger("camera.tracking")


class Listener(Protocol):
    """What is told how a run comes along."""

    def begin(self, pipeline: Pipeline) -> None:
        """The steps are known."""

    def started(self, step: str) -> None:
        """A step is at work (it was not in the store)."""

    def waiting(self, step: str) -> None:
        """Another process is making the same artifact."""

    def progress(self, step: str, done: int, total: int) -> None:
        """A step has come so far."""

    def finished(self, step: str, artifact: Artifact, cached: bool) -> None:
        """A step's artifact is there."""

    def failed(self, step: str, error: BaseException) -> None:
        """A step did not succeed, and the run ends."""


@dataclass(frozen=True)
class Outcome:
    """What a run ends with."""

    artifacts: dict[str, Artifact]
    executed: list[str]
    """Steps that ran, in order; the others were cached."""
    mlflow_run: str | None
    report: Path
    gguf: Path
    published: dict[str, Any] | None
    """The record of the publication; None if there is none."""
    gate: Gate | None = None
    """What the quality gate says; None if the recipe has none."""
    mlflow_pending: str | None = None
    """Why MLflow lacks some or all of the run; None if it has all, or is to have nothing."""


class GateFailed(CameraError):
    """A run is complete, and its model is not good enough to be published. The command line exits with 3."""

    def __init__(self, outcome: Outcome, gate: Gate) -> None:
        self.outcome = outcome
        super().__init__(
            "the model fails the quality gate and is not published:\n"
            + "".join(f"  {reason}\n" for reason in gate.reasons)
            + "It is kept in the store. Prune less; or, if it is good enough, loosen publish.require and run again"
        )


PARENT_TAG = "mlflow.parentRunId"
"""What MLflow's page nests runs by."""
Perform = Callable[[Request], tuple[Artifact, bool]]
"""Gives the artifact of a request, and whether it was cached."""


def run_pipeline(
    pipeline: Pipeline,
    perform: Perform,
    project: Project,
    listener: Listener,
    prefect_run: str | None = None,
    store: Store | None = None,
) -> Outcome:
    """Run every step that the results need; track it if the recipe says so.

    Args:
        pipeline: what to run.
        perform: runs one request: through Prefect or directly.
        project: where MLflow's files go by default.
        listener: told of every step.
        prefect_run: id of the Prefect flow run, for the lineage.
        store: the store that `perform` works in. With it, evicted artifacts that no step needs are not made again,
            and what the run refers to is not evicted meanwhile.
    """
    recipe = pipeline.recipe
    tracker = None
    if recipe.tracking.enabled:
        tracker = Tracker(recipe.tracking.experiment, pipeline.key, recipe.name, project.mlflow_artifacts)
        tags = {"camera.recipe": recipe.name, "camera.source_digest": pipeline.sources.model.digest}
        if recipe.tracking.parent is not None:
            tags[PARENT_TAG] = recipe.tracking.parent
        tracker.log_recipe(
            recipe.model_dump(mode="json"), tags | ({"prefect.flow_run": prefect_run} if prefect_run else {})
        )
    executed: list[str] = []

    def step_done(step: Step, request: Request) -> Artifact:
        if tracker is not None and step.stage is publish.STAGE:
            tracker.catch_up()  # the registration needs the run
        try:
            artifact, cached = perform(replace(request, references=_references(tracker, prefect_run)))
        except BaseException as error:
            listener.failed(step.name, error)
            if isinstance(error, DiskError) and error.full and store is not None:
                raise _with_what_is_missing(error, pipeline, store) from error
            raise
        if not cached:
            executed.append(step.name)
        if tracker is not None:
            tracker.log_stage(step.name, artifact, cached)
            if step.stage is fetch.STAGE:  # MLflow keeps an input once, however often it is logged
                tracker.log_dataset(artifact)
        listener.finished(step.name, artifact, cached)
        return artifact

    listener.begin(pipeline)
    try:
        with ExitStack() as held:
            in_use = (lambda key: None) if store is None else held.enter_context(lease(store))
            artifacts = walk(pipeline, step_done, store=store, in_use=in_use)
        for step in pipeline.steps:
            if artifacts[step.name].evicted:
                if tracker is not None:
                    tracker.log_stage(step.name, artifacts[step.name], cached=True)
                listener.finished(step.name, artifacts[step.name], cached=True)
        outcome = _outcome(artifacts, executed)
        if tracker is not None:
            for file in _files_to_look_at(outcome):
                tracker.log_file(file)
            if outcome.gate is not None:
                tracker.tag({"gate": outcome.gate.verdict, "gate.reasons": "; ".join(outcome.gate.reasons)})
    except BaseException as error:
        if tracker is not None:
            tracker.finish("FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    if tracker is None:
        return outcome
    tracker.finish("FINISHED")
    if outcome.published is not None and outcome.published.get("registry_error"):
        _log.warning("%s is published and not registered; run the recipe again to register it", recipe.name)
    return replace(outcome, mlflow_run=tracker.run_id, mlflow_pending=tracker.pending)


def _references(tracker: Tracker | None, prefect_run: str | None) -> RunReferences:
    """Where the run is recorded by now: a server that was away at the start may have answered since."""
    if tracker is None:
        return RunReferences(None, prefect_run)
    return RunReferences(tracker.run_id, prefect_run, tracker.pending)


def _with_what_is_missing(error: DiskError, pipeline: Pipeline, store: Store) -> DiskError:
    needed, free = room_needed(pipeline, store), shutil.disk_usage(store.root).free
    return DiskError(
        f"{error}. The steps that are left write about {bytes_text(needed)} to {store.root}, where "
        f"{bytes_text(free)} are free; `camera gc --dry-run` shows what could go",
        full=True,
    )


def _outcome(artifacts: dict[str, Artifact], executed: list[str]) -> Outcome:
    published = None
    made_report = artifacts["report"].path / report.HTML
    if "publish" in artifacts:
        record = read_json(artifacts["publish"].path / publish.RECORD)
        published = record if record["folder"] is not None else None
    return Outcome(
        artifacts,
        executed,
        None,
        made_report,
        _gguf(artifacts["convert"], published),
        published,
        read_results(made_report.with_name("results.json")).gate,
    )


def _gguf(converted: Artifact, published: dict[str, Any] | None) -> Path:
    """The main GGUF: in the store, or where it was published if `camera gc` evicted it from there."""
    folder = Path(published["folder"]) if converted.evicted and published else converted.path
    return main_gguf(folder / name for name in converted.manifest["files"])


def hold_to_the_gate(outcome: Outcome) -> Outcome:
    """The outcome of a run, unless its model failed the quality gate.

    Raises:
        GateFailed: with the reasons; the run itself is complete.
    """
    if outcome.gate is not None and not outcome.gate.passed:
        raise GateFailed(outcome, outcome.gate)
    return outcome


def _files_to_look_at(outcome: Outcome) -> list[Path]:
    files = [outcome.report, outcome.report.with_name("results.json")]
    if outcome.published is not None:
        folder = Path(outcome.published["folder"])
        files += [folder / "README.md", folder / "lineage.json"]
    return files
