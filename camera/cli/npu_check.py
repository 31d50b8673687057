"""What `camera npu-check` shows: a line for each step as it ends, then where the report is."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from camera import api
from camera.cli.output import make_console, say
from camera.cli.stages import Stage
from camera.escape import one_line

if TYPE_CHECKING:
    from camera.device_check.plan import Step, Tell
    from camera.device_check.schema import StepRecord

_MARKS = {
    "passed": ("✓", "green"),
    "failed": ("✗", "red"),
    "timed out": ("✗", "red"),
    "skipped": ("–", "dim"),
}


@contextmanager
def _steps(label: str) -> Iterator["Tell"]:
    """Lines on the error stream, and on a terminal what runs now."""
    from rich.status import Status
    from rich.text import Text

    from camera.units import seconds_text

    console = make_console(stderr=True)
    status = Status(Text(one_line(label)), console=console)

    def tell(step: "Step", record: "StepRecord | None") -> None:
        if record is None:
            if console.is_terminal:
                status.update(Text(f"{step.title}, at most {seconds_text(step.seconds)}"))
                status.start()
            return
        status.stop()
        mark, style = _MARKS[record.verdict]
        time = "" if record.verdict == "skipped" else seconds_text(record.seconds)
        line = Text.assemble((f"{mark} ", style), f"{step.title:<36}", (f"{time:>12}", "dim"))
        if record.cause:
            line.append(f"  {one_line(record.cause)}", "dim" if record.fine else style)
        console.print(line)
        if record.advice:
            console.print(Text(f"  → {one_line(record.advice)}", "yellow"))

    try:
        yield tell
    finally:
        status.stop()


def _show(checked: api.Checked, values: dict[str, Any]) -> None:
    say(f"report: {checked.page}")
    say(f"to send back: {checked.archive}")


NPU_CHECK = Stage(
    api.npu_check,
    _show,
    json=lambda checked: checked.report,
    progress=_steps,
    code=lambda checked: 0 if checked.report.passed else 1,
)
