"""One run of a recipe: every step in order, reported to a listener, recorded in MLflow, stopped cleanly."""

import logging
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from camera import shutdown
from camera.disk import DiskError
from camera.errors import CameraError
from camera.guarded import panics_are_errors
from camera.report.gate import Gate
from camera.report.schema import read_results
from camera.units import bytes_text
from tasks.lease import lease
from tasks.pipeline import Pipeline, build_pipeline
from tasks.plan import execute
from tasks.preflight import check_room, room_needed
from tasks.project import Project
from tasks.publication import read_record
from tasks.recipe import Recipe
from tasks.sources import Sources
from tasks.stage import Request, RunReferences, Step, perform
from tasks.stages import fetch, publish, report
from tasks.stages.convert import main_gguf
from tasks.store import Artifact, Store
from tasks.tracking import tracked

_log = logging.getLogger("camera.tracking")


class Listener:
    """What a run reports its steps to. This one ignores them; others override what they show."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """The run is over."""

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


def perform_reporting(
    store: Store,
    request: Request,
    listener: Listener,
    devices: Callable[[Request], AbstractContextManager[None]] = lambda request: nullcontext(),
) -> tuple[Artifact, bool]:
    """Perform a request in this process, reporting to a listener; stops within a stage when a signal asked to.

    Args:
        store: the artifact store.
        request: what to perform.
        listener: told that the step starts, waits, progresses.
        devices: holds the devices that a request computes on, while it does.

    Returns:
        The artifact, and whether it was cached.
    """
    ran = False
    shutdown.check()
    with ExitStack() as held:

        def started() -> None:
            nonlocal ran
            ran = True
            # Only now that the store's lock is held: whoever has the device never waits for a lock.
            held.enter_context(devices(request))
            listener.started(request.step)

        def progress(done: int, total: int) -> None:
            shutdown.check()
            listener.progress(request.step, done, total)

        with panics_are_errors(request.step):
            artifact = perform(
                store,
                request,
                progress=progress,
                started=started,
                waiting=lambda: listener.waiting(request.step),
            )
    return artifact, not ran


def run_recipe(
    recipe: Recipe,
    sources: Sources,
    perform: Perform,
    project: Project,
    listener: Listener,
    prefect_run: str | None = None,
) -> Outcome:
    """Plan a recipe and run it in the project's store, if there is room for what it writes.

    Args:
        recipe: what to run.
        sources: the model and texts it names.
        perform, project, listener, prefect_run: as for `run_pipeline`.

    Raises:
        CameraError: if the store's disk lacks the room.
    """
    pipeline, store = build_pipeline(recipe, sources), Store(project.store)
    check_room(pipeline, store)
    return run_pipeline(pipeline, perform, project, listener, prefect_run)


def run_pipeline(
    pipeline: Pipeline,
    perform: Perform,
    project: Project,
    listener: Listener,
    prefect_run: str | None = None,
) -> Outcome:
    """Run every step that the results need; track it if the recipe says so.

    Evicted artifacts that no step needs are not made again, and what the run refers to is not evicted meanwhile.

    Args:
        pipeline: what to run.
        perform: runs one request: through Prefect or directly.
        project: where the store is, and MLflow's files by default.
        listener: told of every step.
        prefect_run: id of the Prefect flow run, for the lineage.
    """
    recipe, store = pipeline.recipe, Store(project.store)
    executed: list[str] = []

    def step_done(step: Step, request: Request) -> Artifact:
        if step.stage is publish.STAGE:
            tracker.catch_up()  # the registration needs the run
        # A server that was away at the start may have answered since.
        references = RunReferences(tracker.run_id, prefect_run, tracker.pending)
        try:
            artifact, cached = perform(replace(request, references=references))
        except BaseException as error:
            listener.failed(step.name, error)
            if isinstance(error, DiskError) and error.full:
                raise _with_what_is_missing(error, pipeline, store) from error
            raise
        if not cached:
            executed.append(step.name)
        tracker.log_stage(step.name, artifact, cached)
        if step.stage is fetch.STAGE:  # MLflow keeps an input once, however often it is logged
            tracker.log_dataset(artifact)
        listener.finished(step.name, artifact, cached)
        return artifact

    asked = recipe.tracking if recipe.tracking.enabled else None
    with tracked(asked, pipeline.key, recipe.name, project.mlflow_artifacts) as tracker:
        tags = {"camera.recipe": recipe.name, "camera.source_digest": pipeline.sources.model.digest}
        tags |= {} if prefect_run is None else {"prefect.flow_run": prefect_run}
        tags |= {} if recipe.tracking.parent is None else {PARENT_TAG: recipe.tracking.parent}
        tracker.log_recipe(recipe.model_dump(mode="json"), tags)
        listener.begin(pipeline)
        with lease(store) as in_use:
            artifacts = execute(pipeline, step_done, store=store, in_use=in_use)
        for step in pipeline.steps:
            if artifacts[step.name].evicted:
                tracker.log_stage(step.name, artifacts[step.name], cached=True)
                listener.finished(step.name, artifacts[step.name], cached=True)
        outcome = _outcome(artifacts, executed)
        for file in _files_to_look_at(outcome):
            tracker.log_file(file)
        if outcome.gate is not None:
            tracker.tag({"gate": outcome.gate.verdict, "gate.reasons": "; ".join(outcome.gate.reasons)})
    if outcome.published is not None and outcome.published.get("registry_error") and asked is not None:
        _log.warning("%s is published and not registered; run the recipe again to register it", recipe.name)
    return replace(outcome, mlflow_run=tracker.run_id, mlflow_pending=tracker.pending)


def _with_what_is_missing(error: DiskError, pipeline: Pipeline, store: Store) -> DiskError:
    needed, free = room_needed(pipeline, store), shutil.disk_usage(store.root).free
    return DiskError(
        f"{error}. The steps that are left write about {bytes_text(needed)} to {store.root}, where "
        f"{bytes_text(free)} are free; `camera gc --dry-run` shows what could go",
        full=True,
    )


def _outcome(artifacts: dict[str, Artifact], executed: list[str]) -> Outcome:
    published = None
    if "publish" in artifacts:
        record = read_record(artifacts["publish"].path)
        published = record.model_dump() if record.folder is not None else None
    made_report, converted = artifacts["report"].path / report.HTML, artifacts["convert"]
    # The main GGUF is in the store, or where it was published if `camera gc` evicted it from there.
    folder = Path(published["folder"]) if converted.evicted and published else converted.path
    return Outcome(
        artifacts,
        executed,
        mlflow_run=None,
        report=made_report,
        gguf=main_gguf(folder / name for name in converted.manifest["files"]),
        published=published,
        gate=read_results(made_report.with_name("results.json")).gate,
    )


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
