"""What commands print: progress, lines, tables, JSON.

Every text that comes from a file passes `camera.escape` here, whoever passed it before: no line of an answer, no colour and no
sequence that steers a terminal is ever a file's.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camera.escape import json_text, lines_of_one, one_line
from camera.escape import lines as lines_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from camera.progress import Progress


@contextmanager
def progress_bar(label: str) -> Iterator["Progress"]:
    """A bar with the time left on the terminal's error stream; nothing where that is no terminal."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = make_console(stderr=True)
    label_column = TextColumn("{task.description}", markup=False)
    columns = (label_column, BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(one_line(label), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence["str | Text"]], *, title: str | None = None
) -> None:
    """A table without a frame on the output stream, which folds what is too wide.

    Args:
        columns: the headings; one that begins with `>` is of a column aligned to the right. None at all for no heading.
        rows: a cell for each column; a str is one line, shown as it is.
        title: a line above.
    """
    from rich.table import Table
    from rich.text import Text

    title = title and one_line(title)
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, show_header=any(columns))
    for column in columns:
        table.add_column(
            one_line(column.removeprefix(">")),
            overflow="fold",
            justify="right" if column[:1] == ">" else "left",
        )
    for row in rows:
        table.add_row(*(Text(one_line(cell)) if isinstance(cell, str) else cell for cell in row))
    make_console().print(table)


def make_console(*, stderr: bool = False) -> "Console":
    """A console of rich's for which every str is plain text: no markup, no emoji codes, no highlighting; styles are `Text`'s.

    Control characters in what it is given, line feeds apart, are shown as escapes.
    """
    from rich.console import Console, RenderableType
    from rich.segment import Segment

    class Plain(Console):
        def render(self, renderable: RenderableType, options: Any = None) -> Iterable[Segment]:
            for segment in super().render(renderable, options):
                yield segment if segment.control else Segment(lines_of(segment.text), segment.style)

    return Plain(stderr=stderr, markup=False, emoji=False, highlight=False)


def print_json(value: Any) -> None:
    """One JSON document on the output stream; dataclasses by their fields, pydantic models by theirs."""
    document = json.dumps(value, indent=2, ensure_ascii=False, default=_plain)
    sys.stdout.write(json_text(document) + "\n")


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value) if isinstance(value, Path) else value.model_dump(mode="json")


def say(message: str) -> None:
    """One line on the output stream. A line feed in it begins a line that is marked as the same message's."""
    sys.stdout.write(lines_of_one(message) + "\n")


def say_lines(text: str) -> None:
    """Many lines on the output stream, whose names passed `one_line` or `markdown`."""
    sys.stdout.write(lines_of(text) + "\n")


def note(message: str) -> None:
    """One line on the error stream: how work comes along, or why it ended. Line feeds as with `say`."""
    sys.stderr.write(lines_of_one(message) + "\n")
