"""Runs and sweeps in this process without Prefect: the same stages, the same store, other records of the run."""

from collections.abc import Callable

from camera import shutdown
from camera.errors import CameraError
from flows.listeners import MemberListener
from tasks.project import Project
from tasks.recipe import Recipe
from tasks.run import Listener, Outcome, hold_to_the_gate, perform_reporting, run_recipe
from tasks.sources import find_sources
from tasks.stage import Request, find
from tasks.stages import benchmark
from tasks.store import Artifact, Store
from tasks.sweep import Member, Sweep
from tasks.sweep_run import SweepOutcome, hold_to_its_members, run_sweep


def compress(recipe: Recipe, listener: Listener) -> Outcome:
    """Run a recipe; resumes what a flow left, and leaves what a flow resumes.

    Raises:
        GateFailed: once all is done, if the recipe has a quality gate and the model fails it.
    """
    project = Project.here()
    store = Store(project.store)

    def perform(request: Request) -> tuple[Artifact, bool]:
        host = recipe.benchmark_host if request.stage is benchmark.STAGE else None
        if host is not None and find(store, request) is None:
            raise CameraError(
                f"benchmark_host.deployment: {host.deployment} is asked through Prefect: run without --no-prefect, "
                "with PREFECT_API_URL set"
            )
        return perform_reporting(store, request, listener)

    return hold_to_the_gate(run_recipe(recipe, find_sources(recipe), perform, project, listener))


def sweep(asked: Sweep, say: Callable[[str], None]) -> SweepOutcome:
    """Run every combination of a recipe's lists; resumes what a flow left, and leaves what a flow resumes.

    Raises:
        CameraError: if the sweep asks for a deployment.
        SweepFailed: once all is done, if a member has no result or none could be published.
    """
    if asked.options.deployment is not None:
        raise CameraError(
            f"sweep.deployment: {asked.options.deployment} is asked through Prefect: run without --no-prefect"
        )

    def run(member: Member, recipe: Recipe) -> None:
        with shutdown.checked():
            compress(recipe, MemberListener(say, member.name))

    outcome = run_sweep(asked, run, Project.here(), lambda member, line: say(f"{member.name}: {line}"))
    return hold_to_its_members(outcome)
