"""What `camera run` does before its heavy imports: settings, the recipe's faults, and a head start for Prefect."""

import os
from pathlib import Path

from tasks.project import Project
from tasks.recipe import Recipe, load_recipe


def begin_run(recipe: Path, overrides: list[str], *, no_prefect: bool) -> Recipe:
    """Read the recipe, so that a wrong one is refused before anything starts; then let Prefect's API start.

    Raises:
        CameraError: naming the field that is wrong.
    """
    # What fails is told once, by the command line; Prefect would print a traceback of its own for every layer.
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
    os.environ.setdefault("PREFECT_LOGGING_INTERNAL_LEVEL", "CRITICAL")
    # Prefect's own 180 s are as long as the silence after which `camera serve`'s server takes a run for dead.
    os.environ.setdefault("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "30")
    # A server that is gone is asked again for 14 s, not for a minute at each of the last few calls.
    os.environ.setdefault("PREFECT_CLIENT_MAX_RETRIES", "3")
    Project.here().configure()
    checked = load_recipe(recipe, overrides)
    if not no_prefect and "PREFECT_API_URL" not in os.environ:
        from flows.local_api import begin_local_api  # brings prefect, which --no-prefect does not pay

        begin_local_api()
    return checked
