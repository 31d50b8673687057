"""The report of a sweep as a stage: the reports of its members become one page, with JSON and CSV."""

from typing import Any

from camera.options import Options
from camera.report.schema import read_results
from camera.report.sweep import MemberResults, collect_sweep
from camera.report.sweep_page import write_sweep
from tasks.estimate import Needs
from tasks.stage import Context, Stage, register


class MemberOptions(Options):
    """One member."""

    name: str
    label: str
    varied: dict[str, Any]
    failure: str | None
    """Why it has no report."""


class SweepReportOptions(Options):
    """What the page is of."""

    name: str
    varied: tuple[str, ...]
    members: tuple[MemberOptions, ...]
    workers: int


def run(context: Context) -> dict[str, float]:
    """Write `sweep.html`, `sweep.json` and `sweep.csv`. A member without a report is a row with its reason."""
    asked = context.options.of(SweepReportOptions)
    found = {name: read_results(folder / "results.json") for name, folder in context.inputs.items()}
    members = [
        MemberResults(member.name, member.label, member.varied, found.get(member.name), member.failure)
        for member in asked.members
    ]
    results = collect_sweep(asked.name, list(asked.varied), members, asked.workers)
    write_sweep(results, context.out)
    return {"members": len(results.rows), "failed": len(results.failed)}


STAGE = register(
    Stage("sweep", 2, run, {"sweep": SweepReportOptions}, lambda known: Needs(), intermediate=False)
)
