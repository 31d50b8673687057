"""The Prefect flow `compress`: one task per stage, cached by content.

Prefect keeps the record of a stage (a few bytes), the store keeps the artifact. A hit needs both: when the artifact
behind a record is gone or damaged, the record is removed and the stage runs again, under the same key, so that what
follows stays cached. Two runs that want the same artifact at once meet at the store's lock.
"""

import logging
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE, CachePolicy
from prefect.context import TaskRunContext
from prefect.runtime import flow_run
from prefect.utilities.annotations import quote

from camera import shutdown
from camera.errors import NetworkError
from camera.report.schema import read_results
from camera.report.table import results_markdown
from flows.accelerators import accelerators_of
from flows.elsewhere import perform_elsewhere
from flows.listeners import LogListener
from flows.local_api import forget_events
from flows.parameters import Override, RecipeFile
from flows.presence import present
from tasks.pipeline import build_pipeline
from tasks.preflight import check_room
from tasks.project import Project
from tasks.recipe import BenchmarkHostOptions, load_recipe
from tasks.run import Listener, Outcome, hold_to_the_gate, run_pipeline
from tasks.sources import Sources, find_sources
from tasks.stage import Request, find, perform
from tasks.stages import benchmark
from tasks.store import Artifact, Store

LISTENER: ContextVar[Listener | None] = ContextVar("listener", default=None)
"""Who is told of the steps; the command line sets its display here, a worker writes to its log."""
_log = logging.getLogger("camera.run")


@dataclass
class _End:
    """How a run ended, whatever the server could be told of it."""

    outcome: Outcome | None = None
    error: BaseException | None = None


_END: ContextVar[_End | None] = ContextVar("end", default=None)


class StorePolicy(CachePolicy):
    """A task's cache key is its request's; a record whose artifact is not intact is removed first."""

    def compute_key(
        self,
        task_ctx: TaskRunContext,
        inputs: dict[str, Any],
        flow_parameters: dict[str, Any],
        **kwargs: Any,
    ) -> str | None:
        request: Request = inputs["request"]
        if find(Store(Path(inputs["store"])), request) is None:
            (Path(inputs["records"]) / request.key).unlink(missing_ok=True)
        return request.key


def _worth_trying_again(task: Any, run: Any, state: Any) -> bool:
    """Only hub and network errors; whatever else fails would fail again."""
    try:
        state.result()
    except NetworkError:
        return True
    except BaseException:
        return False
    return False


@task(
    cache_policy=StorePolicy(),
    persist_result=True,
    retries=3,
    retry_delay_seconds=[10, 60, 300],
    retry_condition_fn=_worth_trying_again,
    task_run_name="{request.step}",
)
def perform_stage(
    request: Request, store: str, records: str, elsewhere: BenchmarkHostOptions | None = None
) -> dict[str, str]:
    """Perform one stage in the store, here or by a deployment elsewhere; the result is its key, never its content."""
    listener = LISTENER.get() or LogListener()
    ran: list[str] = []
    if elsewhere is not None:
        artifact, found = perform_elsewhere(Store(Path(store)), request, elsewhere)
        return {"stage": artifact.stage, "key": artifact.key, "made": "found" if found else "now"}
    with ExitStack() as held:

        def started() -> None:
            ran.append(request.step)
            # Only once the store's lock is held, as everybody does it: whoever has the device never waits for a lock.
            held.enter_context(accelerators_of(request))
            listener.started(request.step)

        def progress(done: int, total: int) -> None:
            shutdown.check()
            listener.progress(request.step, done, total)

        artifact = perform(
            Store(Path(store)),
            request,
            progress=progress,
            started=started,
            waiting=lambda: listener.waiting(request.step),
        )
    return {"stage": artifact.stage, "key": artifact.key, "made": "now" if ran else "found"}


@task(
    name="find sources",
    cache_policy=NO_CACHE,
    retries=3,
    retry_delay_seconds=[10, 60, 300],
    retry_condition_fn=_worth_trying_again,
)
def _find_sources(recipe: Any) -> Sources:
    return find_sources(recipe)


@flow(name="compress", flow_run_name="compress {recipe}", persist_result=False)
def compress(recipe: RecipeFile, overrides: list[Override] | None = None) -> Outcome:
    """Run a recipe: fetch, capture, score, prune, save, quantise, convert, evaluate, benchmark, report, publish.

    Args:
        recipe: path of the recipe, relative to the working directory.
        overrides: `section.key=value`, as on the command line.

    Raises:
        GateFailed: once all is done, if the recipe has a quality gate and the model fails it.
    """
    shutdown.reinstall()
    project = Project.here()
    project.configure()
    end = _END.get() or _End()
    try:
        with present(project.home):
            end.outcome = _compress(recipe, overrides or [], project)
    except BaseException as error:
        end.error = error
        raise
    return end.outcome


def run_here(recipe: str, overrides: list[str], listener: Listener) -> Outcome:
    """Run the flow in this process. A server that ends in the middle costs its record of the run, not the run.

    Raises:
        NetworkError: if the server is away before the run is under way.
        CameraError: what the run ended with, whether or not the server could be told.
    """
    end = _End()
    told, kept = LISTENER.set(listener), _END.set(end)
    try:
        return compress(recipe, overrides)
    except httpx.HTTPError as lost:  # the run's own HTTP is wrapped where it is used: this is the server's
        forget_events()
        if end.error is not None and end.error is not lost:
            raise end.error from None
        if end.outcome is None:
            raise NetworkError(
                f"Prefect's API at {Project.here().prefect_api} stopped answering ({lost}); what is finished is kept: "
                "start it and run the same command again, or give --no-prefect"
            ) from lost
        _log.warning(
            "Prefect's API at %s stopped answering (%s), so it does not know that this run ended; all is done",
            Project.here().prefect_api,
            lost,
        )
        return end.outcome
    finally:
        _END.reset(kept)
        LISTENER.reset(told)


def _compress(recipe: str, overrides: list[str], project: Project) -> Outcome:
    checked = load_recipe(Path(recipe), overrides)
    pipeline = build_pipeline(checked, _find_sources(quote(checked)))
    store = Store(project.store)
    check_room(pipeline, store)

    def through_prefect(request: Request) -> tuple[Artifact, bool]:
        shutdown.check()
        stage = perform_stage.with_options(name=request.stage.name, result_storage=project.prefect_results)
        elsewhere = checked.benchmark_host if request.stage is benchmark.STAGE else None
        state = stage(
            quote(request), str(store.root), str(project.prefect_results), elsewhere, return_state=True
        )
        made: dict[str, str] = state.result()
        cached = state.name == "Cached" or made["made"] == "found"
        return store.open(made["stage"], made["key"]), cached

    outcome = run_pipeline(
        pipeline, through_prefect, project, LISTENER.get() or LogListener(), str(flow_run.id), store
    )
    results = read_results(outcome.report.with_name("results.json"))
    try:
        create_markdown_artifact(
            results_markdown(results), key="results", description=f"Results of {checked.name}"
        )
    except httpx.HTTPError as error:  # the same table is in the report
        _log.warning("Prefect's API did not take the table of results: %s", error)
    return hold_to_the_gate(outcome)  # a flow run that failed is what schedules and automations notice
