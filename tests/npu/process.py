"""A process whose NPU is the stub, and what it did there."""

import json
import os
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY


@dataclass(frozen=True)
class Outcome:
    """What a process printed, and what the stub saw of it and of the processes that it started."""

    returncode: int
    output: str
    errors: str
    events: list[dict[str, Any]]
    """In their order: `event` is context, allocate, copy, launch, capture, replay or mark; all but mark have a `card`.
    A launch has its `operator`, whether it was `computed`, and `tensors` with dtype, format, shape, strides, storage, card."""

    def between(self, mark: str) -> list[dict[str, Any]]:
        """The events after `mark(name)` in the process, up to its next mark."""
        begun, found = False, []
        for event in self.events:
            if event["event"] == "mark":
                begun = event["name"] == mark
            elif begun:
                found.append(event)
        return found

    def launches(self, mark: str | None = None) -> Counter[str]:
        """How often each operator was launched: in all, or after a mark."""
        events = self.events if mark is None else self.between(mark)
        return Counter(event["operator"] for event in events if event["event"] == "launch")

    def calls(self, operator: str) -> list[dict[str, Any]]:
        """The launches of one operator, with their tensors."""
        return [event for event in self.events if event.get("operator") == operator]

    @property
    def not_computed(self) -> set[str]:
        """Operators that were launched and have no kernel in the stub."""
        return {
            event["operator"] for event in self.events if event["event"] == "launch" and not event["computed"]
        }

    @property
    def cards(self) -> set[int]:
        """Cards that a context was opened on: each takes memory there, whether it is used or not."""
        return {event["card"] for event in self.events if event["event"] == "context"}


@dataclass(frozen=True)
class OnNpu:
    """Runs Python code, or a command of `camera`, in a new process on the stub."""

    wheel: Path
    cann: Path
    """Root of the stub."""
    folder: Path
    """For logs."""

    def __call__(
        self,
        what: str | Sequence[str],
        *,
        strict: bool = True,
        fallback: bool = False,
        environment: Mapping[str, str] | None = None,
        fails: bool = False,
        time_out: float = 300,
    ) -> Outcome:
        """Run it to its end; the test fails unless it succeeds.

        Args:
            what: code, which is dedented, or the words after `camera`.
            strict: an operator without a kernel in the stub is an error, else it writes nothing.
            fallback: whether an operator that torch_npu lacks may run on the CPU.
            environment: more variables: those of driver.cpp (STUB_CARDS, STUB_MEMORY, STUB_CANN), or any other.
            fails: the process is expected to fail.
            time_out: in seconds.
        """
        log = self.folder / f"events-{len(list(self.folder.glob('events-*')))}"
        log.touch()
        code = [sys.executable, "-c", textwrap.dedent(what)] if isinstance(what, str) else None
        done = subprocess.run(
            code or [sys.executable, "-m", "camera", *what],
            env={**os.environ, **self._environment(log, strict, fallback), **(environment or {})},
            capture_output=True,
            text=True,
            timeout=time_out,
        )
        if (done.returncode != 0) != fails:
            pytest.fail(f"exit status {done.returncode}\n{done.stdout}\n{done.stderr[-6000:]}")
        events = [json.loads(line) for line in log.read_text().splitlines()]
        return Outcome(done.returncode, done.stdout, done.stderr, events)

    def _environment(self, log: Path, strict: bool, fallback: bool) -> dict[str, str]:
        return {
            "PYTHONPATH": f"{REPOSITORY}:{self.wheel}",
            "LD_LIBRARY_PATH": f"{self.cann}/lib64",
            "ASCEND_HOME_PATH": str(self.cann),
            "ASCEND_OPP_PATH": f"{self.cann}/opp",
            "STUB_LOG": str(log),
            # Trials of kernels are kept there; those of the stub are no real card's, and serve all tests of a run.
            "XDG_CACHE_HOME": str(self.folder.parent / "cache"),
            **({"STUB_STRICT": "1"} if strict else {}),
            **({} if fallback else {"TORCH_NPU_FALLBACK_CPU_DISABLE": "1"}),
        }


def mark(name: str) -> None:
    """In a process on the stub: name what is launched from here on, after what was queued before has been launched."""
    import torch

    torch.npu.synchronize()
    with open(os.environ["STUB_LOG"], "a", encoding="utf-8") as log:
        log.write(json.dumps({"event": "mark", "name": name}) + "\n")
