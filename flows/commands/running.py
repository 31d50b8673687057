"""Running a recipe from the command line: the display, the table at the end, and where things are."""

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import typer
from rich.console import Console
from rich.text import Text

from camera import shutdown
from camera.cli.output import make_console, note, print_json
from camera.escape import one_line
from camera.report.schema import read_results
from camera.report.table import results_table
from flows.listeners import LiveListener, LogListener
from tasks.project import Project
from tasks.recipe import Recipe
from tasks.run import GateFailed, Listener, Outcome

GATE_FAILED = 3
"""Exit code of a run that is complete, and whose model is not good enough to be published."""


def run_recipe(recipe: Recipe, *, no_prefect: bool, as_json: bool) -> None:
    """Run, showing one line per step; then the results and the paths; exit with 3 if the quality gate failed."""
    project = Project.here()
    console = make_console(stderr=as_json)
    shown = LiveListener(console) if console.is_terminal else LogListener(partial(print_line, console))
    with shown as listener:
        try:
            outcome, failure = _run(recipe, listener, console, no_prefect), None
        except GateFailed as error:
            outcome, failure = error.outcome, str(error)
    results = read_results(outcome.report.with_name("results.json"))
    places = _places(outcome, project)
    if as_json:
        print_json({"results": results, "executed": outcome.executed, **places})
    else:
        console.print()
        console.print(results_table(results))
        show_places(console, places)
    report_failure(failure, GATE_FAILED)


def _run(recipe: Recipe, listener: Listener, console: Console, no_prefect: bool) -> Outcome:
    if no_prefect:
        from flows import without_prefect

        return without_prefect.compress(recipe, listener)
    if "PREFECT_API_URL" not in os.environ:
        print_line(console, "starting Prefect's API in this process …", "dim")
    with shutdown.exit_at_once():
        import mlflow.tracking  # noqa: F401  # two more, which the run would pay later: here the API is still starting

        from flows import compress  # two seconds of imports, which --no-prefect does not pay
        from flows.local_api import check_api, start_local_api

        start_local_api()
        check_api()
    return compress.run_here(recipe, listener)


def _places(outcome: Outcome, project: Project) -> dict[str, str | None]:
    published = outcome.published
    folder = None if published is None else Path(published["folder"])
    gguf = outcome.gguf if folder is None else folder / outcome.gguf.name
    report = outcome.report if folder is None else folder / outcome.report.name
    return {
        "published": None if folder is None else str(folder),
        "gguf": str(gguf),
        "report": str(report),
        "mlflow run": tracked(outcome.mlflow_run, outcome.mlflow_pending, project),
    }


def tracked(mlflow_run: str | None, mlflow_pending: str | None, project: Project) -> str | None:
    """Where MLflow has a run, and what is still to be delivered there."""
    pending = mlflow_pending and f"pending: {mlflow_pending}; run the recipe again"
    if mlflow_run is None:
        return pending
    place = f"{mlflow_run} in {project.mlflow_shown}"
    return f"{place}, {pending}" if pending else place


def show_places(console: Console, places: Mapping[str, str | None]) -> None:
    """A line for each thing that was made."""
    for name, place in places.items():
        print_line(console, f"{name + ':':<13}{place or 'nothing'}")


def print_line(console: Console, line: str, style: str = "") -> None:
    """A line that is not broken where the terminal ends, so that a path can be copied from it."""
    console.print(Text(one_line(line), style), soft_wrap=True)


def report_failure(failure: str | None, code: int) -> None:
    """End with an exit code and a message, where something failed."""
    if failure is not None:
        note(f"camera: {failure}")
        raise typer.Exit(code)
