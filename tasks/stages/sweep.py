"""The report of a sweep as a stage: the reports of its members become one page, with JSON and CSV."""

from camera.report.schema import read_results
from camera.report.sweep import MemberResults, collect_sweep
from camera.report.sweep_page import write_sweep
from tasks.stage import Context, Stage


def run(context: Context) -> dict[str, float]:
    """Write `sweep.html`, `sweep.json` and `sweep.csv`. A member without a report is a row with its reason."""
    members = [
        MemberResults(
            member["name"],
            member["label"],
            member["varied"],
            read_results(context.inputs[member["name"]] / "results.json")
            if member["name"] in context.inputs
            else None,
            member["failure"],
        )
        for member in context.options["members"]
    ]
    results = collect_sweep(
        context.options["name"], context.options["varied"], members, context.options["workers"]
    )
    write_sweep(results, context.out)
    return {"members": len(results.rows), "failed": len(results.failed)}


STAGE = Stage("sweep", version=1, run=run)
