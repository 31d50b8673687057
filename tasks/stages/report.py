"""The report as a stage: one HTML file, and the same results as JSON and CSV."""

from camera.checkpoints.checkpoint import Checkpoint
from camera.report.collect import collect_results
from camera.report.html import write_report
from tasks.gate import judge
from tasks.recipe import RequireOptions
from tasks.stage import Context, Stage

HTML = "report.html"


def run(context: Context) -> dict[str, float]:
    """Write `report.html`, `results.json` and `results.csv`, with the gate's verdict if the recipe has one."""
    folders = dict(context.inputs)
    source = Checkpoint.open(folders.pop("model"))
    results = collect_results(
        name=context.options["name"],
        recipe=context.options["recipe"],
        folders=folders,
        source_config=source.config,
    )
    if (require := context.options.get("require")) is not None:
        results = results.model_copy(update={"gate": judge(results, RequireOptions(**require))})
    write_report(results, context.out, lineage=context.lineage)
    return {}


STAGE = Stage("report", version=2, run=run)
