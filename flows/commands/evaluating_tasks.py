"""What `camera evaluate --tasks` shows: a bar for each task, then a table or JSON."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from camera.evaluation.tasks import TaskProgress
    from camera.report.schema import TaskScore


@contextmanager
def task_bars(label: str, tasks: tuple[str, ...]) -> Iterator["TaskProgress"]:
    """A bar with time left for each task, on the terminal's error stream; nothing where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        rows = {task: bars.add_task(f"{label} {task}", total=None, start=False) for task in tasks}

        def show(task: str, done: int, total: int) -> None:
            bars.start_task(rows[task])  # once: a second call leaves its clock
            bars.update(rows[task], completed=done, total=total)

        yield show


def tasks_json(scores: Mapping[str, "TaskScore"]) -> dict[str, Any]:
    """Values, standard errors and differences, by task."""
    return {task: score.model_dump(mode="json") for task, score in scores.items()}


def tasks_table(scores: Mapping[str, "TaskScore"], compared: bool) -> "Table":
    """A row for each task."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from camera.report.words import accuracy_words

    caption = "accuracy in % ± one standard error"
    if compared:
        caption = "accuracy in %; in brackets points against the reference, ± one standard error of the pairs"
    table = Table(box=SIMPLE_HEAD, caption=caption, caption_justify="left")
    table.add_column("task")
    for column in ("questions", "few-shot", "acc", "acc_norm", *(("gained / lost", "p") if compared else ())):
        table.add_column(column, justify="right")
    for task, score in scores.items():
        cells = [str(score.documents), str(score.few_shot)]
        cells += [accuracy_words(score.metrics.get(name)) for name in ("acc", "acc_norm")]
        if compared and (change := score.metrics["acc"].change) is not None:
            cells += [f"{change.gained} / {change.lost}", f"{change.p_value:.3f}"]
        table.add_row(task, *cells)
    return table
