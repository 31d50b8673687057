"""The Prefect flow `sweep`: every member is a run of the flow `compress`, here or by a deployment on other hosts.

Here the members run one after the other or in threads; torch uses all cores for one of them already. On many hosts
each member is a run of a deployment of `compress`, on workers that share the store.
"""

import logging
from collections.abc import Callable
from contextvars import ContextVar

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.runtime import flow_run

from camera import shutdown
from camera.errors import CameraError
from camera.escape import markdown
from camera.report.sweep_page import sweep_markdown
from flows.compress import LISTENER, compress
from flows.listeners import MemberListener
from flows.parameters import Override, RecipeFile, given_recipe, run_name
from flows.recovery import running_flow
from tasks.project import Project
from tasks.recipe import Recipe
from tasks.run import GateFailed
from tasks.sweep import Member, Sweep, sweep_of
from tasks.sweep_run import RunMember, SweepOutcome, hold_to_its_members, run_sweep

_log = logging.getLogger("camera.run")
SAY: ContextVar[Callable[[str], None]] = ContextVar("say", default=_log.info)
"""Where the lines of the members go; the command line prints them, a worker writes them to its log."""


@flow(name="sweep", flow_run_name=run_name, persist_result=False)
def sweep(recipe: RecipeFile | Recipe, overrides: list[Override] | None = None) -> SweepOutcome:
    """Run every combination of a recipe's lists; what they share is made once, and what is done is not done again.

    Args:
        recipe: path of a recipe with a section `sweep`, relative to the working directory; or the recipe itself.
        overrides: `section.key=value`, as on the command line; for a path.

    Raises:
        SweepFailed: once all is done, if a member has no result or none could be published.
    """
    with running_flow() as project:
        where = "the recipe" if isinstance(recipe, Recipe) else recipe
        return _sweep(sweep_of(given_recipe(recipe, overrides), where), project)


def _sweep(checked: Sweep, project: Project) -> SweepOutcome:
    say = SAY.get()
    run_member = _here(say) if checked.options.deployment is None else _elsewhere(checked, say)
    outcome = run_sweep(
        checked, run_member, project, lambda member, line: say(f"{member.name}: {line}"), str(flow_run.id)
    )
    create_markdown_artifact(
        sweep_markdown(outcome.results), key="sweep", description=f"Sweep {markdown(checked.recipe.name)}"
    )
    return hold_to_its_members(outcome)


def _here(say: Callable[[str], None]) -> RunMember:
    def run(member: Member, recipe: Recipe) -> None:
        token = LISTENER.set(MemberListener(say, member.name))
        try:
            with shutdown.checked():
                compress(recipe)
        finally:
            LISTENER.reset(token)

    return run


def _elsewhere(sweep: Sweep, say: Callable[[str], None]) -> RunMember:
    deployment = str(sweep.options.deployment)

    def run(member: Member, recipe: Recipe) -> None:
        say(f"{member.name}: asked of {deployment}")
        with shutdown.checked():
            made = run_deployment(deployment, parameters={"recipe": recipe.model_dump(mode="json")})
        assert isinstance(made, FlowRun)
        state = made.state
        if state is None or state.is_completed():
            return
        # Of an exception over there only its text comes back. The gate's verdict is in the results, in the store.
        if GateFailed.__name__ not in (state.message or ""):
            raise CameraError(f"{deployment} ended as {state.name} ({made.name}): {state.message}")

    return run
