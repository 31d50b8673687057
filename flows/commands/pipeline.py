"""The whole pipeline: run it, or see what a run would do."""

from typing import Annotated

import typer

from camera import shutdown
from camera.cli.output import print_json, say
from camera.cli.parameters import Json
from flows.commands.shared import Overrides, RecipePath


def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    no_prefect: Annotated[
        bool, typer.Option("--no-prefect", help="The same stages and store in a plain loop.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run a recipe from dataset to published model; what is done already is taken from the store.

    With PREFECT_API_URL set the run is recorded there; without it Prefect's own API runs in this process.

    Exit code 0: all is done; 2: something must be mended first; 3: all is done, and the model fails the recipe's
    quality gate (`publish.require`) and is not published.

    Examples: `camera run recipes/demo.yaml`  `camera run recipes/demo.yaml --set prune.ratio=0.3 --no-prefect`
    """
    with shutdown.exit_at_once():
        from flows.commands.start_up import begin_run

        checked = begin_run(recipe, list(overrides or ()), no_prefect=no_prefect)
        from flows.commands.running import run_recipe  # brings torch, while Prefect's API starts

    run_recipe(checked, no_prefect=no_prefect, as_json=as_json)


def plan(recipe: RecipePath, overrides: Overrides = None, as_json: Json = False) -> None:
    """Show which stages would run, which are cached, and the memory, disk and time they need. Runs nothing else.

    Example: `camera plan recipes/demo.yaml --set prune.ratio=0.3`
    """
    from rich.console import Console
    from rich.table import Table

    from camera.units import bytes_text, seconds_text
    from tasks.pipeline import build_pipeline
    from tasks.preflight import plan as planned
    from tasks.project import Project
    from tasks.recipe import load_recipe
    from tasks.sources import find_sources
    from tasks.store import Store

    project = Project.here()
    project.configure()
    checked = load_recipe(recipe, overrides or [])
    steps = planned(build_pipeline(checked, find_sources(checked)), Store(project.store))
    to_do = [step for step in steps if step.state in ("run", "after")]
    disk = sum(step.disk_bytes for step in to_do)
    memory = max((step.memory_bytes for step in to_do), default=0)
    if as_json:
        entries = [
            {
                "step": entry.step.name,
                "stage": entry.step.stage.name,
                "state": entry.state,
                "disk_bytes": entry.disk_bytes,
                "memory_bytes": entry.memory_bytes,
                "seconds": entry.seconds,
            }
            for entry in steps
        ]
        print_json({"steps": entries, "disk_bytes": disk, "peak_memory_bytes": memory})
        return
    table = Table(title=f"Plan of {checked.name}", title_justify="left")
    for column in ("step", "state", "disk", "memory", "time"):
        table.add_column(column, justify="left" if column in ("step", "state") else "right")
    words = {
        "cached": "cached",
        "evicted": "evicted, not needed",
        "run": "runs",
        "after": "runs, after the above",
    }
    for entry in steps:
        cached = entry.state in ("cached", "evicted")
        table.add_row(
            entry.step.name,
            words[entry.state],
            "" if cached else bytes_text(entry.disk_bytes),
            "" if cached else bytes_text(entry.memory_bytes),
            "" if entry.seconds is None else seconds_text(entry.seconds),
            style="dim" if cached else None,
        )
    Console().print(table)
    say(
        f"{len(to_do)} of {len(steps)} steps to run; about {bytes_text(disk)} of disk and "
        f"{bytes_text(memory)} of memory at the peak (estimated from shapes; the time of capture from a trial of one layer)"
        if to_do
        else "everything is cached"
    )
