"""How well models do: perplexity on texts and accuracy on tasks, each against the original's."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from camera.errors import CameraError
from camera.evaluation.chance import p_by_chance
from camera.evaluation.paired import mean_error, paired
from camera.evaluation.tasks import Metric, TaskResult, read_task_result
from camera.files import read_json
from camera.report.schema import MODEL_IDS, Accuracy, Change, ModelId, ModelRow, Perplexity, TaskScore

AVERAGE = ("acc", "acc_norm")
"""The averages over tasks: of `acc`, and of `acc_norm` where a task has it, else of `acc`."""


def perplexities(folders: Mapping[str, Path]) -> dict[ModelId, dict[str, Perplexity]]:
    """Perplexity by model and text, in the order in which the folders `evaluate/<model>/<text>` are given."""
    found: dict[ModelId, dict[str, dict[str, Any]]] = defaultdict(dict)
    for model, text, folder in _measured(folders, "evaluate"):
        found[model][text] = read_json(folder / "perplexity.json")
    originals = found.get("original", {})
    return {
        model: {text: _perplexity(measured, originals.get(text)) for text, measured in of_texts.items()}
        for model, of_texts in found.items()
    }


def task_scores(folders: Mapping[str, Path]) -> dict[ModelId, dict[str, TaskScore]]:
    """Accuracy by model and task, in the order in which the folders `task/<model>/<task>` are given."""
    found: dict[ModelId, dict[str, TaskResult]] = defaultdict(dict)
    for model, task, folder in _measured(folders, "task"):
        found[model][task] = read_task_result(folder / "task.json")
    originals = found.get("original", {})
    return {
        model: {
            task: score_task(result, None if model == "original" else originals.get(task))
            for task, result in of_tasks.items()
        }
        for model, of_tasks in found.items()
    }


def samples(folders: Mapping[str, Path]) -> dict[ModelId, dict[str, str]]:
    """What models wrote, by prompt, in the folders `sample/<model>`."""
    found: dict[ModelId, dict[str, str]] = {}
    for model in MODEL_IDS:
        if (folder := folders.get(f"sample/{model}")) is not None:
            found[model] = {one["prompt"]: one["text"] for one in read_json(folder / "samples.json")}
    return found


def score_task(result: TaskResult, original: TaskResult | None) -> TaskScore:
    """One model on one task. Compared with the original if both were asked the same questions in the same words."""
    comparable = original is not None and original.prompts == result.prompts
    return TaskScore(
        documents=result.documents,
        few_shot=result.few_shot,
        limit=result.limit,
        dtype=result.dtype,
        chance=result.chance,
        metrics={
            name: _accuracy(
                metric, original.metrics.get(name) if original and comparable else None, result.chance
            )
            for name, metric in result.metrics.items()
        },
    )


def with_averages(rows: Sequence[ModelRow]) -> list[ModelRow]:
    """The rows with their means over tasks, each where a model has all the tasks that any model has.

    Tasks count the same, whatever their size, as in the tables of the literature; their errors are independent.
    """
    tasks = {task for row in rows for task in row.tasks}
    return [
        row.model_copy(update={"task_average": {name: _average(row.tasks, name) for name in AVERAGE}})
        if tasks and len(row.tasks) == len(tasks)
        else row
        for row in rows
    ]


def _measured(folders: Mapping[str, Path], wanted: str) -> Iterator[tuple[ModelId, str, Path]]:
    """Model, text or task, and folder of one kind of measurement."""
    for key, folder in folders.items():
        kind, _, rest = key.partition("/")
        if kind != wanted:
            continue
        label, _, of = rest.partition("/")
        model = next((known for known in MODEL_IDS if known == label), None)
        if model is None or not of:
            raise CameraError(f"report: {key!r} names no model of {', '.join(MODEL_IDS)}, or no text or task")
        yield model, of, folder


def _perplexity(found: dict[str, Any], original: dict[str, Any] | None) -> Perplexity:
    # Texts cut in other windows are other measurements, and their ratio would mean nothing.
    comparable = original is not None and all(found[key] == original[key] for key in ("tokens", "window"))
    return Perplexity(
        value=found["perplexity"],
        change=found["perplexity"] / original["perplexity"] - 1 if original and comparable else None,
        tokens=found["tokens"],
        window=found["window"],
        dtype=found["dtype"],
    )


def _accuracy(metric: Metric, original: Metric | None, chance: float | None) -> Accuracy:
    change, answers = None, metric.of_documents
    if original is not None:
        change = Change(**vars(paired(original.of_documents, metric.of_documents)))
    return Accuracy(
        value=metric.value,
        standard_error=metric.standard_error,
        p_by_chance=None if chance is None else p_by_chance(round(sum(answers)), len(answers), chance),
        change=change,
    )


def _average(tasks: Mapping[str, TaskScore], name: str) -> Accuracy:
    scores = [task.metrics.get(name, task.metrics["acc"]) for task in tasks.values()]
    changes = [score.change for score in scores if score.change is not None]
    change = None
    if len(changes) == len(scores):
        change = Change(
            difference=fmean(change.difference for change in changes),
            standard_error=mean_error([change.standard_error for change in changes]),
            gained=sum(change.gained for change in changes),
            lost=sum(change.lost for change in changes),
        )
    return Accuracy(
        value=fmean(score.value for score in scores),
        standard_error=mean_error([score.standard_error for score in scores]),
        change=change,
    )
