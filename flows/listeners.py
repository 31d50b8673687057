"""What a run reports its steps to: a live display for people, lines for logs."""

import logging
from collections.abc import Callable
from typing import ClassVar, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from camera.escape import one_line
from camera.units import bytes_text, seconds_text
from tasks.pipeline import Pipeline
from tasks.run import Listener
from tasks.store import Artifact

_log = logging.getLogger("camera.run")


class LogListener(Listener):
    """One log line per event; for workers and for output that is no terminal."""

    def __init__(self, write: Callable[[str], object] = _log.info) -> None:
        self._write = write

    def begin(self, pipeline: Pipeline) -> None:
        self._write(f"{pipeline.recipe.name}: {len(pipeline.steps)} steps")

    def started(self, step: str) -> None:
        self._write(f"running  {step}")

    def waiting(self, step: str) -> None:
        self._write(f"waiting  {step}: another run is making it")

    def finished(self, step: str, artifact: Artifact, cached: bool) -> None:
        size = bytes_text(artifact.size_bytes)
        if artifact.metrics.get("withheld"):
            self._write(f"withheld {step}: the quality gate failed")
        elif artifact.evicted:
            self._write(f"evicted  {step} ({size}, not needed)")
        elif cached:
            self._write(f"cached   {step} ({size})")
        else:
            self._write(f"done     {step} in {seconds_text(artifact.seconds)} ({size})")

    def failed(self, step: str, error: BaseException) -> None:
        self._write(f"failed   {step}: {type(error).__name__}")


class MemberListener(LogListener):
    """The lines of one member of a sweep, with its name; none for what was in the store already."""

    def __init__(self, say: Callable[[str], None], name: str) -> None:
        super().__init__(lambda line: say(f"{name}: {line}"))

    def begin(self, pipeline: Pipeline) -> None:
        pass

    def finished(self, step: str, artifact: Artifact, cached: bool) -> None:
        if not cached:
            super().finished(step, artifact, cached)


class LiveListener(Listener):
    """One line per step, live: waiting, running with bar and time left, cached or done with seconds and size."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            _Mark(),
            TextColumn("{task.description}", markup=False),
            _BarWhileRunning(bar_width=28),
            TextColumn("{task.fields[note]}", markup=False),
            _TimeLeft(),
            console=console,
            refresh_per_second=8,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def begin(self, pipeline: Pipeline) -> None:
        for step in pipeline.steps:
            task = self._progress.add_task(one_line(step.name), total=None, start=False, state="", note="")
            self._tasks[step.name] = task

    def started(self, step: str) -> None:
        self._progress.start_task(self._tasks[step])
        self._progress.update(self._tasks[step], state="running", note="running")

    def waiting(self, step: str) -> None:
        self._progress.update(self._tasks[step], note="waits for another run that is making it")

    def progress(self, step: str, done: int, total: int) -> None:
        note = f"{100 * done // max(total, 1)} %"
        self._progress.update(self._tasks[step], completed=done, total=total, note=note)

    def finished(self, step: str, artifact: Artifact, cached: bool) -> None:
        how = "evicted" if artifact.evicted else "cached" if cached else seconds_text(artifact.seconds)
        state, note = "cached" if cached else "done", f"{how:>8}  {bytes_text(artifact.size_bytes):>9}"
        if artifact.metrics.get("withheld"):
            state, note = "failed", "withheld: the quality gate failed"
        self._progress.update(self._tasks[step], total=1, completed=1, state=state, note=note)

    def failed(self, step: str, error: BaseException) -> None:
        self._progress.update(self._tasks[step], state="failed", note="failed")


class _Mark(ProgressColumn):
    _marks: ClassVar = {
        "running": ("●", "cyan"),
        "cached": ("=", "green"),
        "done": ("✓", "green"),
        "failed": ("✗", "red"),
    }

    def render(self, task: Task) -> Text:
        mark, style = self._marks.get(task.fields["state"], ("·", "dim"))
        return Text(mark, style=style)


class _BarWhileRunning(BarColumn):
    def render(self, task: Task):  # type: ignore[no-untyped-def]  # rich gives no narrower type than its own bar
        return super().render(task) if task.fields["state"] == "running" else Text("")


class _TimeLeft(TimeRemainingColumn):
    def render(self, task: Task) -> Text:
        return super().render(task) if task.fields["state"] == "running" else Text("")
