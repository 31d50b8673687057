"""What `camera run` does before its heavy imports: settings, the recipe's faults, and a head start for Prefect."""

import os
from pathlib import Path

from tasks.project import Project
from tasks.recipe import load_recipe


def begin_run(recipe: Path, overrides: list[str], *, no_prefect: bool) -> None:
    """Refuse a wrong recipe before anything starts, then let Prefect's API start while this process imports.

    Raises:
        CameraError: naming the field that is wrong.
    """
    # What fails is told once, by the command line; Prefect would print a traceback of its own for every layer.
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
    Project.here().configure()
    load_recipe(recipe, overrides)
    if not no_prefect and "PREFECT_API_URL" not in os.environ:
        from flows.local_api import begin_local_api  # brings prefect, which --no-prefect does not pay

        begin_local_api()
