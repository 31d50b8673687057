"""The report as a stage: one HTML file, and the same results as JSON and CSV."""

from typing import Any

from camera.checkpoints.checkpoint import Checkpoint
from camera.options import Options
from camera.report.collect import collect_results
from camera.report.html import write_report
from tasks.estimate import Needs
from tasks.gate import judge
from tasks.recipe import RequireOptions
from tasks.stage import Context, Stage, register

HTML = "report.html"


class ReportOptions(Options):
    """What the report is of."""

    name: str
    recipe: dict[str, Any]
    require: RequireOptions | None = None


def run(context: Context) -> dict[str, float]:
    """Write `report.html`, `results.json` and `results.csv`, with the gate's verdict if the recipe has one."""
    folders = dict(context.inputs)
    source = Checkpoint.open(folders.pop("model"))
    asked = context.options.of(ReportOptions)
    results = collect_results(name=asked.name, recipe=asked.recipe, folders=folders, source=source)
    if asked.require is not None:
        results = results.model_copy(update={"gate": judge(results, asked.require)})
    write_report(results, context.out, lineage=context.lineage)
    return {}


STAGE = register(
    Stage("report", 4, run, {"report": ReportOptions}, lambda known: Needs(), intermediate=False)
)
