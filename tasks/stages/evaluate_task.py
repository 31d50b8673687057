"""Evaluation as a stage: one model on one task. So one more task does not measure the others again."""

from camera.evaluation.tasks import evaluate_tasks
from camera.files import write_json
from tasks.stage import Context, Stage

RESULT = "task.json"


def run(context: Context) -> dict[str, float]:
    """Write `task.json`."""
    options = {name: value for name, value in context.options.items() if name not in ("task", "lm_eval")}
    name = context.options["task"]
    result = evaluate_tasks(
        context.inputs["model"],
        [name],
        task_folder=context.inputs.get("documents"),
        progress=lambda task, done, total: context.progress(done, total),
        **options,
    )[name]
    write_json(context.out / RESULT, result.model_dump(mode="json"))
    found: dict[str, float] = {"documents": result.documents}
    for metric, measured in result.metrics.items():
        found[metric] = measured.value
        if measured.standard_error is not None:
            found[f"{metric}_standard_error"] = measured.standard_error
    return found


STAGE = Stage("task", version=1, run=run)
