"""Many runs of one recipe: every combination of the values that it lists."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from camera import shutdown
from camera.cli.output import print_json, say
from camera.cli.parameters import Json
from flows.commands.shared import Overrides, RecipePath

if TYPE_CHECKING:
    from tasks.sweep import MemberPlan, Sweep


def sweep(
    recipe: RecipePath,
    overrides: Overrides = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Members at work at once. More than one disturbs measured speeds.",
            show_default="sweep.workers",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the members and what they share; run nothing.")
    ] = False,
    no_prefect: Annotated[
        bool, typer.Option("--no-prefect", help="The same stages and store in a plain loop.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run every combination of the values in a recipe's section `sweep`, and show them by size and perplexity.

    What members share is made once; a sweep that was stopped goes on, and redoes nothing.

    Exit code 0: all members have results; 1: some have none, and the others do; 2: something must be mended first;
    3: no member is good enough for `sweep.publish: best`.

    Examples: `camera sweep recipes/sweep-demo.yaml --dry-run`
    `camera sweep recipes/sweep-demo.yaml --set sweep.ratios=[0.1,0.3] --no-prefect`
    """
    changes = [*(overrides or ()), *([] if workers is None else [f"sweep.workers={workers}"])]
    if dry_run:
        _show_plan(recipe, changes, as_json)
        return
    with shutdown.exit_at_once():
        from flows.commands.running_sweeps import run

    run(recipe, changes, no_prefect=no_prefect, as_json=as_json)


def _show_plan(recipe: Any, overrides: list[str], as_json: bool) -> None:
    from tasks.project import Project
    from tasks.store import Store
    from tasks.sweep import executions, load_sweep, plan_sweep

    project = Project.here()
    project.configure()
    checked = load_sweep(recipe, overrides)
    plans = plan_sweep(checked, Store(project.store))
    steps = {name: dict(counts) for name, counts in executions(plans).items()}
    if as_json:
        members = [
            {
                "name": plan.member.name,
                "varied": plan.member.varied,
                "problem": plan.problem,
                "steps": plan.steps,
            }
            for plan in plans
        ]
        print_json({"members": members, "steps": steps})
        return
    _print_plan(checked, plans, steps)


def _print_plan(sweep: "Sweep", plans: "list[MemberPlan]", steps: dict[str, dict[str, int]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    members = Table(title=f"Members of {sweep.recipe.name}", title_justify="left")
    for column in ("member", *sweep.axes):
        members.add_column(column)
    for column in ("to run", "shared", "cached"):
        members.add_column(column, justify="right")
    for plan in plans:
        states = list(plan.steps.values())
        counts = [str(states.count(state)) for state in ("run", "shared", "cached")]
        values = [str(value) for value in plan.member.varied.values()]
        members.add_row(plan.member.name, *map(escape, values), *(counts if plan.pipeline else ["–"] * 3))
    console.print(members)
    for plan in plans:
        if plan.problem is not None:
            console.print(f"cannot run: {plan.member.name}: {escape(plan.problem)}", style="yellow")
    shared = Table(title="Steps of all members", title_justify="left")
    shared.add_column("step")
    for column in ("to run", "shared", "cached"):
        shared.add_column(column, justify="right")
    for name, counts_of in steps.items():
        shared.add_row(escape(name), *(str(counts_of.get(state, 0)) for state in ("run", "shared", "cached")))
    console.print(shared)
    total = {
        state: sum(counts_of.get(state, 0) for counts_of in steps.values())
        for state in ("run", "shared", "cached")
    }
    say(
        f"{len(plans)} members: {total['run']} steps to run, {total['shared']} shared with a member before, "
        f"{total['cached']} in the store"
    )
