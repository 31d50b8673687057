"""One sweep: every member run or resumed, what they found put side by side, the chosen ones published."""

import logging
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextvars import copy_context
from dataclasses import dataclass, replace
from pathlib import Path

from camera.errors import CameraError
from camera.guarded import panics_are_errors
from camera.report.sweep import SweepResults, best_member, read_sweep
from camera.report.sweep_page import CSV, HTML, JSON
from tasks.lease import lease
from tasks.options import Sections
from tasks.pipeline import build_pipeline
from tasks.project import Project
from tasks.publication import read_record
from tasks.recipe import Recipe
from tasks.run import GateFailed
from tasks.stage import Input, Request, perform
from tasks.stages.sweep import STAGE, MemberOptions, SweepReportOptions
from tasks.store import Artifact, Store
from tasks.sweep import Member, MemberPlan, Sweep, plan_sweep, stored, sweep_key
from tasks.tracking import Tracker, Untracked, tracked

_log = logging.getLogger("camera.sweep")

RunMember = Callable[[Member, Recipe], None]
"""Runs the recipe of a member to its end. Raises what stops it."""
Told = Callable[[Member, str], None]
"""Told of a member what became of it, in a line."""


@dataclass(frozen=True)
class SweepOutcome:
    """What a sweep ends with."""

    results: SweepResults
    report: Path
    """The page; JSON and CSV lie beside it."""
    published: dict[str, str]
    """Folders by member."""
    unpublished: str | None
    """Why no member was published although the best should have been."""
    mlflow_run: str | None
    mlflow_pending: str | None = None
    """Why MLflow lacks what was to be recorded; None if it has all."""

    @property
    def failed(self) -> int:
        """Members without a result."""
        return len(self.results.failed)


class SweepFailed(CameraError):
    """A sweep is complete as far as it could be: a member has no result, or none was good enough to be published."""

    def __init__(self, outcome: SweepOutcome) -> None:
        self.outcome = outcome
        count, rows = outcome.failed, outcome.results.rows
        lines = [f"{count} of {len(rows)} members failed:"] if count else []
        lines += [f"  {row.name}: {row.failure}" for row in outcome.results.failed]
        if outcome.unpublished is not None:
            lines.append(f"nothing is published: {outcome.unpublished}")
        super().__init__("\n".join(lines))


def hold_to_its_members(outcome: SweepOutcome) -> SweepOutcome:
    """The outcome of a sweep of which every member has a result, and the best could be published if it was to be.

    Raises:
        SweepFailed: with the outcome, for another.
    """
    if outcome.failed or outcome.unpublished is not None:
        raise SweepFailed(outcome)
    return outcome


def run_sweep(
    sweep: Sweep, run_member: RunMember, project: Project, told: Told, prefect_run: str | None = None
) -> SweepOutcome:
    """Run every member; one that fails is a row with its reason, and the others go on.

    What a killed sweep had finished is in the store, so that the next one redoes nothing.

    Args:
        sweep: what to run.
        run_member: runs one member: in this process, through Prefect, or by a deployment elsewhere.
        project: where the store is, and MLflow's files by default.
        told: what became of each member.
        prefect_run: id of the Prefect flow run.

    Raises:
        CameraError: if the model or a text is missing, or MLflow cannot be used and waiting would not help: that stops every
            member.
    """
    store, recipe = Store(project.store), sweep.recipe
    plans = plan_sweep(sweep, store)
    asked = recipe.tracking if recipe.tracking.enabled else None
    with tracked(asked, sweep_key(sweep, plans), recipe.name, project.mlflow_artifacts) as tracker:
        tags = {"camera.sweep": recipe.name, "camera.recipe": recipe.name}
        tags |= {} if prefect_run is None else {"prefect.flow_run": prefect_run}
        tracker.log_recipe(recipe.model_dump(mode="json"), tags)
        parent = tracker.run_id
        failures = _run_all(sweep, plans, lambda member: run_member(member, member.to_run(parent)), told)
        artifact = _report(sweep, plans, failures, store)
        results = read_sweep(artifact.path / JSON)
        chosen, unpublished = plans, None
        if sweep.options.publish == "best":
            chosen = _best(plans, results)
            if not chosen:
                unpublished = "no member meets publish.require: loosen it and run again, or prune less"
            for plan in chosen:
                run_member(plan.member, plan.member.to_run(parent, publish=True))
        outcome = SweepOutcome(
            results, artifact.path / HTML, _published(chosen, store), unpublished, tracker.run_id
        )
        _record(tracker, outcome)
        tracker.failed = outcome.failed > 0
    return replace(outcome, mlflow_run=tracker.run_id, mlflow_pending=tracker.pending)


def _run_all(
    sweep: Sweep, plans: list[MemberPlan], run: Callable[[Member], None], told: Told
) -> dict[str, str]:
    """Run the members that can run, as many at once as the sweep says; why the others have no result, by name."""
    failures = {plan.member.name: plan.problem for plan in plans if plan.problem is not None}
    for plan in plans:
        if plan.problem is not None:
            told(plan.member, f"failed: {plan.problem}")

    def one(member: Member) -> None:
        try:
            with panics_are_errors("stopped"):
                run(member)
        except GateFailed as error:
            told(member, f"done, {str(error).splitlines()[0].removesuffix(':')}")
        except Exception as error:  # whatever stops one member must not stop the others
            if not isinstance(error, CameraError):
                _log.exception("%s failed", member.name)
            reason = str(error) if isinstance(error, CameraError) else f"{type(error).__name__}: {error}"
            failures[member.name] = reason
            told(member, f"failed: {reason}")
        else:
            told(member, "done")

    members = [plan.member for plan in plans if plan.problem is None]
    if sweep.options.workers == 1:
        for member in members:
            one(member)
        return failures
    pool = ThreadPoolExecutor(sweep.options.workers, thread_name_prefix="member")
    try:
        # A copy of the context each: it says which flow run a member belongs to.
        futures = [pool.submit(copy_context().run, one, member) for member in members]
        wait(futures, return_when=FIRST_EXCEPTION)
        for future in futures:
            future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return failures


def _report(sweep: Sweep, plans: list[MemberPlan], failures: dict[str, str], store: Store) -> Artifact:
    inputs: dict[str, Input] = {}
    members = []
    for plan in plans:
        name, failure = plan.member.name, failures.get(plan.member.name)
        made = None if plan.pipeline is None else stored(plan.pipeline, store).get("report")
        if failure is None and made is None:
            failure = "it ended, and its report is not in this store: workers must share CAMERA_HOME"
        if made is not None:
            inputs[name] = Input.of(made)
        members.append(
            MemberOptions(name=name, label=plan.member.label, varied=plan.member.varied, failure=failure)
        )
    name, workers = sweep.recipe.name, sweep.options.workers
    options = SweepReportOptions(name=name, varied=sweep.axes, members=tuple(members), workers=workers)
    request = Request(f"sweep {name}", STAGE, Sections(sweep=options), inputs)
    with lease(store) as in_use:
        in_use(request.key)
        return perform(store, request)


def _best(plans: list[MemberPlan], results: SweepResults) -> list[MemberPlan]:
    """The plan of the best member, now to be published; none if no member may be."""
    best = best_member(results)
    return [
        replace(plan, pipeline=build_pipeline(plan.member.to_run(publish=True), plan.pipeline.sources))
        for plan in plans
        if best is not None and plan.member.name == best.name and plan.pipeline is not None
    ]


def _published(plans: list[MemberPlan], store: Store) -> dict[str, str]:
    """The folders of the members that are published, by name."""
    found = {}
    for plan in plans:
        made = None if plan.pipeline is None else stored(plan.pipeline, store).get("publish")
        folder = None if made is None else read_record(made.path).folder
        if folder is not None:
            found[plan.member.name] = folder
    return found


def _record(tracker: Tracker | Untracked, outcome: SweepOutcome) -> None:
    for name in (HTML, JSON, CSV):
        tracker.log_file(outcome.report.with_name(name))
    rows = outcome.results.rows
    numbers = {"members": float(len(rows)), "members_failed": float(outcome.failed)}
    numbers["members_on_front"] = float(sum(bool(row.on_front) for row in rows))
    tracker.measure(numbers)
    tracker.tag({f"camera.published.{name}": folder for name, folder in outcome.published.items()})
