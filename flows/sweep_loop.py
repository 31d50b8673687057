"""The same sweep in a plain loop or in threads, without Prefect."""

from collections.abc import Callable
from pathlib import Path

from camera import shutdown
from camera.errors import CameraError
from flows import loop
from flows.listeners import MemberListener
from tasks.project import Project
from tasks.sweep import Member, load_sweep
from tasks.sweep_run import SweepOutcome, hold_to_its_members, run_sweep


def sweep(recipe: Path, overrides: list[str], say: Callable[[str], None]) -> SweepOutcome:
    """Run every combination of a recipe's lists; resumes what a flow left, and leaves what a flow resumes.

    Raises:
        CameraError: if the sweep asks for a deployment.
        SweepFailed: once all is done, if a member has no result or none could be published.
    """
    checked = load_sweep(recipe, overrides)
    if checked.options.deployment is not None:
        raise CameraError(
            f"sweep.deployment: {checked.options.deployment} is asked through Prefect: run without --no-prefect"
        )

    def run(member: Member, changes: list[str]) -> None:
        with shutdown.checked():
            loop.compress(recipe, changes, MemberListener(say, member.name))

    outcome = run_sweep(checked, run, Project.here(), lambda member, line: say(f"{member.name}: {line}"))
    return hold_to_its_members(outcome)
