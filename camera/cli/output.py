"""What commands print: progress, lines, JSON."""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.text import Text

    from camera.progress import Progress


@contextmanager
def progress_bar(label: str) -> Iterator["Progress"]:
    """A bar with the time left on the terminal's error stream; nothing where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence["str | Text"]], *, title: str | None = None
) -> None:
    """A table without a frame on the output stream, which folds what is too wide.

    Args:
        columns: the headings; one that begins with `>` is of a column aligned to the right. None at all for no heading.
        rows: a cell for each column; text is shown as it is.
        title: a line above.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, show_header=any(columns))
    for column in columns:
        table.add_column(
            column.removeprefix(">"), overflow="fold", justify="right" if column[:1] == ">" else "left"
        )
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    Console().print(table)


def print_json(value: Any) -> None:
    """One JSON document on the output stream; dataclasses by their fields, pydantic models by theirs."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value) if isinstance(value, Path) else value.model_dump(mode="json")


def say(message: str) -> None:
    """One line on the output stream."""
    sys.stdout.write(message + "\n")


def note(message: str) -> None:
    """One line on the error stream: how work comes along."""
    sys.stderr.write(message + "\n")
