"""Running a sweep from the command line: a line for what happens, the table at the end, and where things are."""

import os
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from camera.cli.output import make_console, note, print_json
from camera.escape import one_line
from camera.report.sweep import summary
from camera.report.sweep_page import CSV, JSON, sweep_table
from flows.commands.running import GATE_FAILED, print_line, report_failure, show_places, tracked
from flows.commands.shared import here
from tasks.sweep import Sweep, load_sweep
from tasks.sweep_run import SweepFailed, SweepOutcome

MEMBERS_FAILED = 1
"""Exit code of a sweep of which some members have no result, and the others do."""


def run(recipe: Path, overrides: list[str], *, no_prefect: bool, as_json: bool) -> None:
    """Run, then print the table and the paths; the exit code says whether a member failed or none was good enough."""
    # Errors are reported once, by the command line; Prefect would print a traceback of its own for every layer.
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
    project = here()
    checked = load_sweep(recipe, overrides)  # a wrong recipe is refused before anything starts
    console = make_console(stderr=as_json)
    threads = checked.options.workers > 1
    try:
        outcome, failure = _run(checked, console, no_prefect), None
    except SweepFailed as error:
        outcome, failure = error.outcome, str(error)
    except KeyboardInterrupt:
        if threads:  # nothing can interrupt a thread; what it was at resumes from its working folder
            note("stopped; run the same command again to go on from here")
            sys.stderr.flush()
            os._exit(130)
        raise
    places = {
        "report": str(outcome.report),
        "json": str(outcome.report.with_name(JSON)),
        "csv": str(outcome.report.with_name(CSV)),
        "mlflow run": tracked(outcome.mlflow_run, outcome.mlflow_pending, project),
    }
    if as_json:
        print_json({"results": outcome.results, "published": outcome.published, **places})
    else:
        console.print()
        name, words = one_line(outcome.results.name), one_line(summary(outcome.results))
        console.print(Text.assemble((name, "bold"), f"  {words}"))
        console.print(sweep_table(outcome.results))
        for name, folder in outcome.published.items():
            print_line(console, f"published:   {name} in {folder}")
        show_places(console, places)
    report_failure(failure, MEMBERS_FAILED if outcome.failed else GATE_FAILED)


def _run(asked: Sweep, console: Console, no_prefect: bool) -> SweepOutcome:
    def say(line: str) -> None:
        print_line(console, line)

    if no_prefect:
        from flows import without_prefect

        return without_prefect.sweep(asked, say)
    if "PREFECT_API_URL" not in os.environ:
        print_line(console, "starting Prefect's API in this process …", "dim")
    from flows import sweep  # two seconds of imports, which --no-prefect does not pay
    from flows.local_api import start_local_api

    start_local_api()
    token = sweep.SAY.set(say)
    try:
        return sweep.sweep(asked.recipe)
    finally:
        sweep.SAY.reset(token)
