"""What several commands share: options from flags, and a progress bar."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from camera.options import Options
    from camera.progress import Progress

    AnyOptions = TypeVar("AnyOptions", bound=Options)

BUILT_IN = ("stdlib", "wikitext2", "c4")


def checked(kind: "type[AnyOptions]", **values: Any) -> "AnyOptions":
    """Options of a kind from flags; None means the default.

    Raises:
        CameraError: naming the flag that is wrong.
    """
    from pydantic import ValidationError

    from camera.errors import CameraError

    try:
        return kind(**{name: value for name, value in values.items() if value is not None})
    except ValidationError as error:
        lines = []
        for entry in error.errors():
            flag = "--" + ".".join(map(str, entry["loc"])).replace("_", "-") if entry["loc"] else "options"
            lines.append(f"{flag}: {str(entry['msg']).removeprefix('Value error, ')}")
        raise CameraError("; ".join(lines)) from None


def dataset(text: str) -> dict[str, Any]:
    """A dataset as people write it: the name of a built-in one, or a path."""
    return {"name": text} if text in BUILT_IN else {"name": "file", "path": Path(text)}


@contextmanager
def progress_bar(label: str) -> Iterator["Progress"]:
    """A bar with time left on the terminal's error stream; nothing where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_json(value: Any) -> None:
    """One JSON document on the output stream."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def say(message: str) -> None:
    """One line on the output stream."""
    sys.stdout.write(message + "\n")


def note(message: str) -> None:
    """One line on the error stream: how work comes along."""
    sys.stderr.write(message + "\n")
