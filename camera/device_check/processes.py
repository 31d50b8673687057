"""A step's process: started with a time-out, and ended with all that it started."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil

from camera.device_check.child import Given
from camera.device_check.plan import Step
from camera.options import CheckOptions

_ENVIRONMENT = {
    "TORCH_NPU_FALLBACK_CPU_DISABLE": "1",  # an operator without a kernel raises, and is not computed on the CPU
    "PYTHONUNBUFFERED": "1",
}
_PATIENCE = 5.0
"""Seconds from asking a process to end until it is ended."""


def run_apart(step: Step, options: CheckOptions, findings: Path, scratch: Path, log: Path) -> int | None:
    """Run a step in a process of its own; returns its exit code, None if it ran out of time.

    Args:
        step: what to run.
        options: for it.
        findings: the file that it writes what it finds to.
        scratch: an existing folder for its files.
        log: what it prints is added to this file.
    """
    command = [sys.executable, "-m", f"{__package__}.child", step.module, str(findings), str(scratch)]
    with log.open("ab") as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **_ENVIRONMENT, "TMPDIR": str(scratch)},
            start_new_session=True,
        )
        assert process.stdin is not None
        try:
            with suppress(BrokenPipeError):  # it has ended already, and its exit code says how
                given = Given(options=options, arguments=step.given)
                process.stdin.write(given.model_dump_json().encode() + b"\n")
                process.stdin.flush()
            return process.wait(step.seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end(process)
            with suppress(BrokenPipeError):
                process.stdin.close()


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process group and whoever of its descendants left it."""
    family: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        for one in family:
            with suppress(psutil.NoSuchProcess):
                one.send_signal(number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE)
            if number == signal.SIGTERM and not psutil.wait_procs(family, _PATIENCE)[1]:
                break
    process.wait()
