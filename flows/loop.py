"""The same stages and the same store in a plain loop, without Prefect."""

from pathlib import Path

from camera import shutdown
from camera.errors import CameraError
from tasks.pipeline import build_pipeline
from tasks.preflight import check_room
from tasks.project import Project
from tasks.recipe import load_recipe
from tasks.run import Listener, Outcome, hold_to_the_gate, run_pipeline
from tasks.sources import find_sources
from tasks.stage import Request, find, perform
from tasks.stages import benchmark
from tasks.store import Artifact, Store


def compress(recipe: Path, overrides: list[str], listener: Listener) -> Outcome:
    """Run a recipe; resumes what a flow left, and leaves what a flow resumes.

    Raises:
        GateFailed: once all is done, if the recipe has a quality gate and the model fails it.
    """
    project = Project.here()
    checked = load_recipe(recipe, overrides)
    pipeline = build_pipeline(checked, find_sources(checked))
    store = Store(project.store)
    check_room(pipeline, store)

    def directly(request: Request) -> tuple[Artifact, bool]:
        shutdown.check()
        elsewhere = checked.benchmark_host if request.stage is benchmark.STAGE else None
        if elsewhere is not None and find(store, request) is None:
            raise CameraError(
                f"benchmark_host.deployment: {elsewhere.deployment} is asked through Prefect: run without --no-prefect, "
                "with PREFECT_API_URL set"
            )
        ran: list[str] = []

        def started() -> None:
            ran.append(request.step)
            listener.started(request.step)

        def progress(done: int, total: int) -> None:
            shutdown.check()
            listener.progress(request.step, done, total)

        artifact = perform(
            store,
            request,
            progress=progress,
            started=started,
            waiting=lambda: listener.waiting(request.step),
        )
        return artifact, not ran

    return hold_to_the_gate(run_pipeline(pipeline, directly, project, listener, store=store))
