"""Evaluation as a stage: one model on one task. So one more task does not measure the others again."""

from dataclasses import replace

from camera.evaluation.tasks import evaluate_tasks
from camera.files import write_json
from camera.options import TaskOptions
from tasks.estimate import Known, Needs
from tasks.stage import Context, Stage, register
from tasks.stages import evaluate

RESULT = "task.json"
_LM_EVAL_BYTES = 40 << 20


class EvaluateTaskOptions(TaskOptions):
    """How accuracy is measured on one task."""

    task: str
    """Its name in lm-eval."""


def run(context: Context) -> dict[str, float]:
    """Write `task.json`."""
    asked = context.options.of(EvaluateTaskOptions)
    result = evaluate_tasks(
        context.inputs["model"],
        [asked.task],
        task_folder=context.inputs.get("documents"),
        progress=lambda task, done, total: context.progress(done, total),
        **asked.model_dump(exclude={"task"}),
    )[asked.task]
    write_json(context.out / RESULT, result.model_dump(mode="json"))
    found: dict[str, float] = {"documents": result.documents}
    for metric, measured in result.metrics.items():
        found[metric] = measured.value
        if measured.standard_error is not None:
            found[f"{metric}_standard_error"] = measured.standard_error
    return found


def needs(known: Known) -> Needs:
    """As on a text, and the library lm-eval."""
    on_text = evaluate.needs_on(known, known.options.of(EvaluateTaskOptions), None)
    return replace(on_text, memory=on_text.memory + _LM_EVAL_BYTES)


STAGE = register(Stage("task", 4, run, {"task": EvaluateTaskOptions}, needs, intermediate=False, part="task"))
