"""What a step is given, and where it writes what it finds: line by line, so that a kill loses nothing."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camera.device_check.schema import Measurement
from camera.device_check.shapes import Shapes, shapes_of
from camera.options import CheckOptions
from camera.results import Result

if TYPE_CHECKING:
    import torch


class Line(Result):
    """One line of a step's file; one field is set."""

    measurement: Measurement | None = None
    details: dict[str, Any] | None = None
    failure: str | None = None
    """What the step could not go on after."""
    done: bool = False
    """The step came to its end."""


@dataclass(frozen=True)
class Context:
    """Of one step."""

    options: CheckOptions
    findings: Path
    """The file of lines."""
    scratch: Path
    """A folder that is removed when the step has ended."""

    @cached_property
    def device(self) -> "torch.device":
        """What is checked."""
        from camera.devices import resolve_device  # imports torch, and `imports` says so where that fails

        return resolve_device(self.options.device)

    @cached_property
    def shapes(self) -> Shapes:
        return shapes_of(self.options)

    def measure(self, what: str, value: float, unit: str = "", **of: str | int) -> None:
        """Add a figure that has no bounds."""
        self.add(Measurement(what=what, value=value, unit=unit, of=of))

    def add(self, measurement: Measurement) -> None:
        """Add a figure."""
        self._write(Line(measurement=measurement))

    def tell(self, **details: Any) -> None:
        """Add what is no figure, as plain JSON."""
        self._write(Line(details=details))

    def fail(self, reason: str) -> None:
        """Say what ended the step."""
        self._write(Line(failure=reason))

    def finish(self) -> None:
        """Say that the step came to its end."""
        self._write(Line(done=True))

    def _write(self, line: Line) -> None:
        with self.findings.open("a", encoding="utf-8") as file:
            file.write(line.model_dump_json(exclude_defaults=True) + "\n")


def read_lines(path: Path) -> list[Line]:
    """What a step wrote; a last line that a kill cut off is none."""
    if not path.is_file():
        return []
    found = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(Line.model_validate(json.loads(text)))
        except json.JSONDecodeError:
            break
    return found
