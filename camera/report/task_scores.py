"""Accuracy on tasks as results hold it: each model against the original, question by question."""

from collections.abc import Mapping, Sequence
from statistics import fmean

from camera.evaluation.paired import mean_error, paired
from camera.evaluation.tasks import Metric, TaskResult
from camera.report.schema import Accuracy, Change, ModelRow, TaskScore

AVERAGE = ("acc", "acc_norm")
"""The averages over tasks: of `acc`, and of `acc_norm` where a task has it, else of `acc`."""


def score_task(result: TaskResult, original: TaskResult | None) -> TaskScore:
    """One model on one task. Compared with the original if both were asked the same questions in the same words."""
    comparable = original is not None and original.prompts == result.prompts
    return TaskScore(
        documents=result.documents,
        few_shot=result.few_shot,
        limit=result.limit,
        dtype=result.dtype,
        metrics={
            name: _accuracy(metric, original.metrics.get(name) if original and comparable else None)
            for name, metric in result.metrics.items()
        },
    )


def _accuracy(metric: Metric, original: Metric | None) -> Accuracy:
    change = None
    if original is not None:
        change = Change(**vars(paired(original.of_documents, metric.of_documents)))
    return Accuracy(value=metric.value, standard_error=metric.standard_error, change=change)


def with_averages(rows: Sequence[ModelRow]) -> list[ModelRow]:
    """The rows with their means over tasks, each where a model has all the tasks that any model has.

    Tasks count the same, whatever their size, as in the tables of the literature; their errors are independent.
    """
    tasks = list(dict.fromkeys(task for row in rows for task in row.tasks))
    return [
        row.model_copy(update={"task_average": {name: _average(row.tasks, name) for name in AVERAGE}})
        if tasks and len(row.tasks) == len(tasks)
        else row
        for row in rows
    ]


def _average(tasks: Mapping[str, TaskScore], name: str) -> Accuracy:
    scores = [task.metrics.get(name, task.metrics["acc"]) for task in tasks.values()]
    changes = [score.change for score in scores if score.change is not None]
    return Accuracy(
        value=fmean(score.value for score in scores),
        standard_error=mean_error([score.standard_error for score in scores]),
        change=None
        if len(changes) < len(scores)
        else Change(
            difference=fmean(change.difference for change in changes),
            standard_error=mean_error([change.standard_error for change in changes]),
            gained=sum(change.gained for change in changes),
            lost=sum(change.lost for change in changes),
        ),
    )
