"""The Prefect flow `compress`: one task per stage, cached by content.

Prefect keeps the record of a stage (a few bytes), the store keeps the artifact. A hit needs both: when the artifact
behind a record is gone or damaged, the record is removed and the stage runs again, under the same key, so that what
follows stays cached. Two runs that want the same artifact at once meet at the store's lock.
"""

import logging
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
from camera.escape import markdown
from camera.guarded import panics_are_errors
from camera.report.schema import read_results
from camera.report.table import results_markdown
from flows.device_limits import device_slots
from flows.listeners import LogListener
from flows.local_api import forget_events
from flows.parameters import Override, RecipeFile, given_recipe, run_name
from flows.recovery import running_flow
from flows.remote import perform_remotely
from tasks.project import Project
from tasks.recipe import BenchmarkHostOptions, Recipe
from tasks.run import Listener, Outcome, hold_to_the_gate, perform_reporting, run_recipe
from tasks.sources import Sources, find_sources
from tasks.stage import Request, find
from tasks.stages import benchmark
from tasks.store import Artifact, Store

LISTENER: ContextVar[Listener | None] = ContextVar("listener", default=None)
"""What the steps are reported to; the command line sets its display here, a worker writes to its log."""
_log = logging.getLogger("camera.run")


@dataclass
class _End:
    """How a run ended, also where the server could not be told."""

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


def _is_transient(task: Any, run: Any, state: Any) -> bool:
    """Only hub and network errors; whatever else fails would fail again."""
    try:
        state.result()
    except NetworkError:
        return True
    except BaseException:
        return False
    return False


_RETRIES: dict[str, Any] = {
    "retries": 3,
    "retry_delay_seconds": [10, 60, 300],
    "retry_condition_fn": _is_transient,
}


@task(cache_policy=StorePolicy(), persist_result=True, task_run_name="{request.step}", **_RETRIES)
def perform_stage(
    request: Request, store: str, records: str, host: BenchmarkHostOptions | None = None
) -> dict[str, str]:
    """Perform one stage in the store, here or by a deployment on another host; the result is its key, never its content."""
    if host is not None:
        artifact, found = perform_remotely(Store(Path(store)), request, host)
    else:
        listener = LISTENER.get() or LogListener()
        artifact, found = perform_reporting(Store(Path(store)), request, listener, device_slots)
    return {"stage": artifact.stage, "key": artifact.key, "made": "found" if found else "now"}


@task(name="find sources", cache_policy=NO_CACHE, **_RETRIES)
def _find_sources(recipe: Any) -> Sources:
    return find_sources(recipe)


@flow(name="compress", flow_run_name=run_name, persist_result=False)
def compress(recipe: RecipeFile | Recipe, overrides: list[Override] | None = None) -> Outcome:
    """Run a recipe: fetch, capture, score, prune, save, quantise, convert, evaluate, benchmark, report, publish.

    Args:
        recipe: path of the recipe, relative to the working directory; or the recipe itself, checked already.
        overrides: `section.key=value`, as on the command line; for a path.

    Raises:
        GateFailed: once all is done, if the recipe has a quality gate and the model fails it.
    """
    end = _END.get() or _End()
    try:
        with running_flow() as project, panics_are_errors("stopped"):
            end.outcome = _compress(given_recipe(recipe, overrides), project)
    except BaseException as error:
        end.error = error
        raise
    return end.outcome


def run_here(recipe: Recipe, listener: Listener) -> Outcome:
    """Run the flow in this process. A server that ends in the middle costs its record of the run, not the run.

    Raises:
        NetworkError: if the server is away before the run is under way.
        CameraError: what the run ended with, whether or not the server could be told.
    """
    end = _End()
    tokens = LISTENER.set(listener), _END.set(end)
    try:
        return compress(recipe)
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
        LISTENER.reset(tokens[0])
        _END.reset(tokens[1])


def _compress(recipe: Recipe, project: Project) -> Outcome:
    store = Store(project.store)

    def perform(request: Request) -> tuple[Artifact, bool]:
        shutdown.check()
        stage = perform_stage.with_options(name=request.stage.name, result_storage=project.prefect_results)
        host = recipe.benchmark_host if request.stage is benchmark.STAGE else None
        records = str(project.prefect_results)
        state = stage(quote(request), str(store.root), records, host, return_state=True)
        made: dict[str, str] = state.result()
        return store.open(made["stage"], made["key"]), state.name == "Cached" or made["made"] == "found"

    listener = LISTENER.get() or LogListener()
    outcome = run_recipe(recipe, _find_sources(quote(recipe)), perform, project, listener, str(flow_run.id))
    results = read_results(outcome.report.with_name("results.json"))
    try:
        table = results_markdown(results)
        create_markdown_artifact(table, key="results", description=f"Results of {markdown(recipe.name)}")
    except httpx.HTTPError as error:  # the same table is in the report
        _log.warning("Prefect's API did not take the table of results: %s", error)
    return hold_to_the_gate(outcome)  # a flow run that failed is what schedules and automations notice
