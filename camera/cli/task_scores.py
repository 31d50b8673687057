"""`camera evaluate --tasks`: scores of a model and its reference, as a table or JSON."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camera.cli.output import task_progress

if TYPE_CHECKING:
    from rich.table import Table

    from camera.options import EvaluateOptions
    from camera.report.schema import TaskScore

    Scores = Mapping[str, TaskScore]


def on_tasks(
    model: Path, reference: Path | None, tokenizer: Path, out: Path | None, options: "EvaluateOptions"
) -> "tuple[Scores, Scores]":
    """The scores of a model, and those of the reference that it is compared with, by task."""
    from camera.evaluation.tasks import evaluate_tasks
    from camera.report.scores import score_task

    how = options.model_dump(include={"few_shot", "limit", "task_folder", "batch_size", "dtype", "device"})
    measured = {}
    for label, path in (("reference", reference), ("model", model)):
        if path is not None:
            kept = None if out is None else out / label
            with task_progress(path.name, options.tasks) as progress:
                measured[label] = evaluate_tasks(
                    path, options.tasks, tokenizer=tokenizer, out=kept, progress=progress, **how
                )
    originals = measured.get("reference", {})
    return (
        {task: score_task(result, originals.get(task)) for task, result in measured["model"].items()},
        {task: score_task(result, None) for task, result in originals.items()},
    )


def tasks_json(scores: "Scores", originals: "Scores") -> dict[str, Any]:
    """Values, standard errors and differences, by task."""
    found = {"tasks": scores} | ({"reference_tasks": originals} if originals else {})
    return {
        name: {task: score.model_dump(mode="json") for task, score in each.items()}
        for name, each in found.items()
    }


def tasks_table(scores: "Scores", compared: bool) -> "Table":
    """A row for each task."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from camera.report.words import accuracy_words

    shots = max(score.few_shot for score in scores.values())
    caption = f"n questions, {shots}-shot; accuracy in %, ± one standard error"
    if compared:
        caption += "; in brackets points against the reference, ± one standard error of the pairs"
    table = Table(
        box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption=caption, caption_justify="left"
    )
    table.add_column("task", no_wrap=True)
    columns = ("n", "acc", "acc_norm", *(("gained", "lost", "p") if compared else ()))
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for task, score in scores.items():
        cells = [
            str(score.documents),
            *(accuracy_words(score.metrics.get(name)) for name in ("acc", "acc_norm")),
        ]
        if compared and (change := score.metrics["acc"].change) is not None:
            cells += [str(change.gained), str(change.lost), f"{change.p_value:.3f}"]
        table.add_row(task, *cells)
    return table
