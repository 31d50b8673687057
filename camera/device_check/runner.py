"""Runs the steps one after the other, takes what an earlier run finished, and judges each."""

import shutil
import signal
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from textwrap import shorten
from time import perf_counter
from typing import Any

from camera import __version__
from camera.ascend.causes import explain
from camera.device_check.context import Line, read_lines
from camera.device_check.plan import STEPS, Step, Tell
from camera.device_check.privacy import Redactor
from camera.device_check.processes import run_apart
from camera.device_check.schema import CheckReport, Measurement, Reason, StepRecord
from camera.device_check.shapes import shapes_of
from camera.digests import digest_json
from camera.errors import CameraError
from camera.files import write_json
from camera.locks import output_lock
from camera.options import CheckOptions
from camera.versions import versions

_MARK, _MEANING = (
    ".npu-check",
    "This folder was made by `camera npu-check`, which removes and replaces files in it.\n",
)
_FELL_BACK = "fall back to run on the CPU"
"""What a torch_npu warns of that cannot be forbidden it."""
_LAST_CHARACTERS = 4000
"""Of a log, in which the cause of an end is looked for."""
_MOST_NAMED, _LONGEST_ERROR = 3, 160
"""Of what does not hold, in a step's cause; the figures have all of it."""


def check(
    options: CheckOptions, out: Path, tell: Tell | None = None, steps: Sequence[Step] = STEPS
) -> CheckReport:
    """Run what has not passed yet, and gather everything.

    Args:
        options: what to check.
        out: the folder for steps and logs: missing, empty, or of an earlier run.
        tell: told of every step.
        steps: what is run, in this order.

    Raises:
        CameraError: for an unknown step, for a folder of something else, or if another process works in it.
    """
    out = out.resolve()
    names = [step.name for step in steps]
    if unknown := set(options.again) - set(names):
        raise CameraError(f"again: {', '.join(sorted(unknown))} is none of {', '.join(names)}")
    with output_lock(out):
        _claim(out)
        return _Check(options, out, tell or (lambda step, record: None)).run(steps)


def _claim(out: Path) -> None:
    """Mark a folder as a check's, in which files are removed and sent; raises CameraError if it holds anything else."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / _MARK).is_file():
        if any(out.iterdir()):
            raise CameraError(f"{out} is not empty, and no check made it: name a new folder")
        (out / _MARK).write_text(_MEANING, encoding="utf-8")


class _Check:
    """A run of the check."""

    def __init__(self, options: CheckOptions, out: Path, tell: Tell) -> None:
        self.options, self.out, self.tell = options, out, tell
        self.redact = Redactor(options, out)
        self.records: dict[str, StepRecord] = {}
        for folder in ("steps", "logs"):
            (out / folder).mkdir(parents=True, exist_ok=True)

    def run(self, steps: Sequence[Step]) -> CheckReport:
        for step in steps:
            self.records[step.name] = self._record(step)
            self.tell(step, self.records[step.name])
        return CheckReport(
            camera=__version__,
            made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S"),
            device=self.options.device,
            name=str(self._found("name") or self.options.device),
            stub=bool(self._found("stub")),
            size="quick" if self.options.quick else "tiny" if self.options.tiny else "full",
            passed=all(record.fine for record in self.records.values()),
            host=self._host(),
            settings={
                "shapes": vars(shapes_of(self.options)),
                "given": sorted(self.options.model_fields_set),
            },
            steps=tuple(self.records.values()),
        )

    def _host(self) -> dict[str, Any]:
        """What the host's step told; nothing before it, or where it is not among the steps."""
        return self.records["host"].details if "host" in self.records else {}

    def _found(self, detail: str) -> Any:
        """What a step told under a name."""
        return next((each.details[detail] for each in self.records.values() if detail in each.details), None)

    def _record(self, step: Step) -> StepRecord:
        if self.options.kind not in step.kinds:
            return _skipped(step, "does not apply", f"is for {' and '.join(step.kinds)}")
        if step.asks and getattr(self.options, step.asks) is None:
            return _skipped(step, "not asked for", f"--{step.asks.replace('_', '-')} was not given")
        missing = [name for name in step.needs if self.records[name].verdict != "passed"]
        if missing:
            return _skipped(step, "stands on others", f"{' and '.join(missing)} did not pass")
        key, file = self._key(step), self.out / "steps" / f"{step.name}.json"
        # The host is looked at each time: whether the card is free now is no matter of yesterday.
        if step.name != "host" and step.name not in self.options.again and file.is_file():
            earlier = StepRecord.read(file, f"remove {file}")
            if earlier.key == key and earlier.verdict == "passed":
                return earlier
        self.tell(step, None)
        record = self._run(step, key)
        write_json(file, record.model_dump(mode="json"))
        return record

    def _key(self, step: Step) -> str:
        """Of what the step's result depends on."""
        heeded = {name: getattr(self.options, name) for name in (step.asks, *step.heeds) if name}
        return digest_json(
            {
                "step": [step.name, step.version, step.given],
                "shapes": vars(shapes_of(self.options)),
                "device": self.options.device,
                "host": self._host().get("identity"),
                "camera": __version__,
                "versions": versions(),
                "heeded": {name: _stamp(path) for name, path in heeded.items() if path is not None},
            }
        )

    def _run(self, step: Step, key: str) -> StepRecord:
        findings, log = (self.out / "steps" / f"{step.name}.jsonl", self.out / "logs" / f"{step.name}.log")
        scratch = self.out / "work" / step.name
        for path in (findings, log):
            path.unlink(missing_ok=True)
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        began = perf_counter()
        try:
            code = run_apart(step, self.options, findings, scratch, log)
        finally:
            shutil.rmtree(self.out / "work", ignore_errors=True)
            printed = self.redact(log.read_text(encoding="utf-8", errors="replace")) if log.is_file() else ""
            log.write_text(printed, encoding="utf-8")
        seconds = perf_counter() - began
        lines = [self.redact.result(line) for line in read_lines(findings)]
        findings.unlink(missing_ok=True)
        return _judged(step, key, lines, code, printed).model_copy(update={"seconds": round(seconds, 2)})


def _judged(step: Step, key: str, lines: list[Line], code: int | None, printed: str) -> StepRecord:
    """The record of a step that ran: its lines, the exit code of its process (None: out of time), and its log."""
    measurements = tuple(line.measurement for line in lines if line.measurement)
    details: dict[str, Any] = {}
    for line in lines:
        details |= line.details or {}
    record = StepRecord(
        name=step.name,
        title=step.title,
        key=key,
        verdict="passed",
        measurements=measurements,
        details=details,
    )
    failure = next((line.failure for line in lines if line.failure), None)
    if code is None:
        cause = f"did not end within its time of {step.seconds} s"
        return record.model_copy(update={"verdict": "timed out", "cause": cause})
    wrong = [one for one in measurements if not one.holds and not one.optional]
    if failure is not None:
        cause = " ".join(failure.split())
    elif not any(line.done for line in lines):
        cause = f"its process ended by {_ending(code)}"
    elif _FELL_BACK in printed:
        cause = next(line.strip() for line in printed.splitlines() if _FELL_BACK in line)
    elif wrong:
        named = "; ".join(f"{one.name}: {_why(one)}" for one in wrong[:_MOST_NAMED])
        more = f"; and {len(wrong) - _MOST_NAMED} more" if len(wrong) > _MOST_NAMED else ""
        cause = f"{len(wrong)} of {len(measurements)} do not hold: {named}{more}"
    else:
        return record
    advice = explain(cause) or explain(printed[-_LAST_CHARACTERS:]) or ""
    return record.model_copy(update={"verdict": "failed", "cause": cause, "advice": advice})


def _why(one: Measurement) -> str:
    if one.error is not None:
        return shorten(one.error, _LONGEST_ERROR, placeholder=" …")
    if one.value is None:
        return "has no value"
    above = one.at_most is not None and one.value > one.at_most
    bound = f"more than {one.at_most:.3g}" if above else f"less than {one.at_least:.3g}"
    return f"{one.value:.3g} {one.unit}".strip() + f" is {bound}"


def _ending(code: int) -> str:
    if code < 0:
        return f"signal {-code} ({signal.Signals(-code).name})"
    return f"exit code {code}, before the step came to its end"


def _skipped(step: Step, reason: Reason, cause: str) -> StepRecord:
    return StepRecord(name=step.name, title=step.title, key="", verdict="skipped", reason=reason, cause=cause)


def _stamp(path: Path) -> list[Any]:
    """What a path holds, by names, sizes and times: hashing a model takes minutes."""
    files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
    return [
        [str(path.absolute()), len(files)],
        [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files],
    ]
