"""The whole pipeline: run it, or see what a run would do."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from camera import shutdown
from camera.cli.options import Json
from camera.cli.output import print_json, print_table, say
from camera.escape import one_line
from flows.commands.shared import NoPrefect, Overrides, RecipePath, here

if TYPE_CHECKING:
    from tasks.recipe import Recipe


def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    no_prefect: NoPrefect = False,
    as_json: Json = False,
) -> None:
    """Run a recipe from dataset to published model; what is done already is taken from the store.

    With PREFECT_API_URL set the run is recorded there; without it Prefect's own API runs in this process.

    Exit code 0: all is done; 2: something must be mended first; 3: all is done, and the model fails the recipe's
    quality gate (`publish.require`) and is not published.

    Examples: `camera run recipes/demo.yaml`  `camera run recipes/demo.yaml --set prune.ratio=0.3 --no-prefect`
    """
    with shutdown.exit_at_once():
        checked = _begin(recipe, list(overrides or ()), no_prefect)
        from flows.commands.running import run_recipe  # brings torch, while Prefect's API starts

    run_recipe(checked, no_prefect=no_prefect, as_json=as_json)


def _begin(recipe: Path, overrides: list[str], no_prefect: bool) -> "Recipe":
    """Read the recipe, so that a wrong one is refused before anything starts; then let Prefect's API start.

    Raises:
        CameraError: naming the field that is wrong.
    """
    from tasks.recipe import load_recipe

    # Errors are reported once, by the command line; Prefect would print a traceback of its own for every layer.
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
    os.environ.setdefault("PREFECT_LOGGING_INTERNAL_LEVEL", "CRITICAL")
    # Prefect's own 180 s are as long as the silence after which `camera serve`'s server takes a run for dead.
    os.environ.setdefault("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "30")
    # A server that is gone is asked again for 14 s, not for a minute at each of the last few calls.
    os.environ.setdefault("PREFECT_CLIENT_MAX_RETRIES", "3")
    here()
    checked = load_recipe(recipe, overrides)
    if not no_prefect and "PREFECT_API_URL" not in os.environ:
        from flows.local_api import begin_local_api  # brings prefect, which --no-prefect does not need

        begin_local_api()
    return checked


def plan(recipe: RecipePath, overrides: Overrides = None, as_json: Json = False) -> None:
    """Show which stages would run, which are cached, and the memory, disk and time they need. Runs nothing else.

    Refuses what a run would refuse, though it be in its last step: a model of which there is no GGUF file, a place where
    nothing can be published.

    Example: `camera plan recipes/demo.yaml --set prune.ratio=0.3`
    """
    from rich.text import Text

    from camera.pruning.plan import plan_prune
    from camera.quantization.plan import notable_types
    from camera.units import bytes_text, seconds_text
    from tasks.pipeline import build_pipeline
    from tasks.preflight import check_end
    from tasks.preflight import plan as planned
    from tasks.recipe import load_recipe
    from tasks.sources import find_sources
    from tasks.store import Store

    project = here()
    checked = load_recipe(recipe, overrides or [])
    sources = find_sources(checked)
    pipeline = build_pipeline(checked, sources)
    store = Store(project.store)
    steps = planned(pipeline, store)
    splits = plan_prune(sources.checkpoint, checked.capture, checked.prune).candidates
    types = notable_types(sources.checkpoint, checked.quantize)
    to_do = [step for step in steps if step.state in ("run", "after")]
    concerns = check_end(pipeline, [step.step.name for step in to_do], store)
    disk = sum(step.disk_bytes for step in to_do)
    memory = max((step.memory_bytes for step in to_do), default=0)
    if as_json:
        plain = ("state", "disk_bytes", "memory_bytes", "seconds")
        entries = [
            {
                "step": entry.step.name,
                "stage": entry.step.stage.name,
                **{name: getattr(entry, name) for name in plain},
            }
            for entry in steps
        ]
        found = {"steps": entries, "disk_bytes": disk, "peak_memory_bytes": memory}
        notes = {"splits": splits, "types": types, "gguf": concerns}
        print_json(found | {name: lines for name, lines in notes.items() if lines})
        return
    rows = []
    for entry in steps:
        needs = ("", "") if entry not in to_do else map(bytes_text, (entry.disk_bytes, entry.memory_bytes))
        time = "" if entry.seconds is None else seconds_text(entry.seconds)
        style = "" if entry in to_do else "dim"
        rows.append(
            [Text(one_line(cell), style) for cell in (entry.step.name, _STATES[entry.state], *needs, time)]
        )
    print_table(("step", "state", ">disk", ">memory", ">time"), rows, title=f"Plan of {checked.name}")
    say(
        f"{len(to_do)} of {len(steps)} steps to run; about {bytes_text(disk)} of disk and "
        f"{bytes_text(memory)} of memory at the peak (estimated from shapes; the time of capture from a trial of one layer)"
        if to_do
        else "everything is cached"
    )
    for line in (*types, *concerns):
        say(line)
    if to_do and len(splits) > 1:
        ways = ", ".join(f"{experts} × {channels}" for experts, channels in splits)
        say(
            f"prune.experts auto: capture chooses among {ways} (experts × channels); sizes are those of the largest"
        )


_STATES = {
    "cached": "cached",
    "evicted": "evicted, not needed",
    "run": "runs",
    "after": "runs, after the above",
}
