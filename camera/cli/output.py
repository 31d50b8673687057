"""What commands print: progress, lines, JSON."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

    from camera.evaluation.tasks import TaskProgress
    from camera.progress import Progress


@contextmanager
def _bars() -> Iterator["Bars"]:
    """Bars with the time left on the terminal's error stream; nothing where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        yield bars


@contextmanager
def progress_bar(label: str) -> Iterator["Progress"]:
    """One such bar."""
    with _bars() as bars:
        task = bars.add_task(label, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


@contextmanager
def task_progress(label: str, tasks: tuple[str, ...]) -> Iterator["TaskProgress"]:
    """A bar for each task."""
    with _bars() as bars:
        rows = {task: bars.add_task(f"{label} {task}", total=None, start=False) for task in tasks}

        def show(task: str, done: int, total: int) -> None:
            bars.start_task(rows[task])  # the clock starts at the first call
            bars.update(rows[task], completed=done, total=total)

        yield show


def print_json(value: Any) -> None:
    """One JSON document on the output stream."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def say(message: str) -> None:
    """One line on the output stream."""
    sys.stdout.write(message + "\n")


def note(message: str) -> None:
    """One line on the error stream: how work comes along."""
    sys.stderr.write(message + "\n")
