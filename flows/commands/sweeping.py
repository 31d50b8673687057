"""Many runs of one recipe: every combination of the values that it lists."""

from typing import TYPE_CHECKING, Annotated

import typer

from camera import shutdown
from camera.cli.options import Json
from camera.cli.output import print_json, print_table, say
from flows.commands.shared import NoPrefect, Overrides, RecipePath, here

if TYPE_CHECKING:
    from pathlib import Path


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
    no_prefect: NoPrefect = False,
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


def _show_plan(recipe: "Path", overrides: list[str], as_json: bool) -> None:
    from tasks.store import Store
    from tasks.sweep import executions, load_sweep, plan_sweep

    project = here()
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
    states = ("run", "shared", "cached")
    counted = (">to run", ">shared", ">cached")
    rows = []
    for plan in plans:
        found = list(plan.steps.values())
        counts = [str(found.count(state)) if plan.pipeline else "–" for state in states]
        rows.append([plan.member.name, *map(str, plan.member.varied.values()), *counts])
    print_table(("member", *checked.axes, *counted), rows, title=f"Members of {checked.recipe.name}")
    for plan in plans:
        if plan.problem is not None:
            say(f"cannot run: {plan.member.name}: {plan.problem}")
    rows = [[name, *(str(of.get(state, 0)) for state in states)] for name, of in steps.items()]
    print_table(("step", *counted), rows, title="Steps of all members")
    run, shared, cached = (sum(of.get(state, 0) for of in steps.values()) for state in states)
    say(
        f"{len(plans)} members: {run} steps to run, {shared} shared with a member before, {cached} in the store"
    )
