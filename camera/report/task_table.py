"""The table of the Ascend version of CAMERA: perplexity, the tasks and their average, a column for each model."""

from camera.report.grid import Grid
from camera.report.schema import Accuracy, ModelRow, Results
from camera.report.words import accuracy_words, count_words, score_words

_CERTAIN = 0.05
"""McNemar's p below which a difference is marked."""


def task_grid(results: Results) -> Grid | None:
    """One row for each text and each task, with differences from the original. None if no task was measured."""
    tasks = results.tasks
    if not tasks:
        return None
    models = [row for row in results.models if row.tasks]
    rows = [(f"perplexity, {text}", *(score_words(row, text) for row in models)) for text in results.datasets]
    rows += [(task, *(_cell(row, task, "acc") for row in models)) for task in tasks]
    rows += _averages(models, tasks, "acc", "average")
    normalised = [
        task
        for task in tasks
        if any("acc_norm" in row.tasks[task].metrics for row in models if task in row.tasks)
    ]
    rows += [(f"{task}, norm", *(_cell(row, task, "acc_norm") for row in models)) for task in normalised]
    if normalised:
        rows += _averages(models, tasks, "acc_norm", "average, norm")
    return Grid(
        "Perplexity and accuracy on tasks",
        ("", *(row.title for row in models)),
        tuple(rows),
        words=1,
        strong=tuple(index for index, row in enumerate(rows) if row[0].startswith("average")),
        notes=_notes(results, models, bool(normalised)),
    )


def _averages(models: list[ModelRow], tasks: tuple[str, ...], name: str, label: str) -> list[tuple[str, ...]]:
    if len(tasks) < 2 or not any(row.task_average for row in models):
        return []
    return [(label, *(accuracy_words(row.task_average.get(name)) for row in models))]


def _cell(row: ModelRow, task: str, name: str) -> str:
    score = row.tasks[task].metrics.get(name) if task in row.tasks else None
    return accuracy_words(score) + ("*" if _is_certain(score) else "")


def _is_certain(score: Accuracy | None) -> bool:
    change = None if score is None else score.change
    return change is not None and change.p_value is not None and change.p_value < _CERTAIN


def _notes(results: Results, models: list[ModelRow], normalised: bool) -> tuple[str, ...]:
    scores = [score for row in models for score in row.tasks.values()]
    shots = "–".join(map(str, sorted({score.few_shot for score in scores})))
    first = models[0]
    limited = any(score.limit is not None for score in scores)
    notes = [
        f"accuracy in %, {shots}-shot, by lm-eval; ± one standard error; "
        f"{count_words(sum(score.documents for score in first.tasks.values()))} questions"
        f"{', the first ones of each task only' if limited else ''}, layers in "
        f"{' and '.join(sorted({score.dtype for score in scores}))}",
        "in brackets: points more or less than the original on the same questions, ± one standard error of the "
        "difference in pairs",
    ]
    if any(
        _is_certain(score) for row in models for task in row.tasks.values() for score in task.metrics.values()
    ):
        notes.append(f"*: more than chance (exact McNemar test, p < {_CERTAIN})")
    if normalised:
        notes.append(
            "norm: the answer of the highest likelihood per character (acc_norm); average, norm: of these where a task has it"
        )
    texts = [row.perplexity[text] for text in results.datasets if (row := first) and text in row.perplexity]
    for label, text in zip(results.datasets, texts, strict=False):
        notes.append(
            f"perplexity, {label}: {count_words(text.tokens)} tokens in windows of {text.window}, layers in {text.dtype}"
        )
    return tuple(notes)
