"""Ctrl-C and SIGTERM at random moments of a run's life: it stops, says so with 130, and goes on later.

The rule: the exit code is 130, or 0 if the run had published before the signal came. Before the command line is read
(no output, no state folder) the signal itself ends the process, as it does any.
"""

import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.conftest import Project, lay_out
from tests.faults.test_networks import environment
from tests.flows.steps import STEPS

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

TRACKED = ("--set", "tracking.enabled=true")


def moments(seed: int, count: int) -> list[tuple[str | None, float]]:
    """Steps to begin, and seconds after that; None stands for the process itself, whose imports take a while."""
    chance = random.Random(seed)
    found: list[tuple[str | None, float]] = [(None, chance.uniform(2, 6))]
    found += [(chance.choice(STEPS), chance.uniform(0, 0.1)) for _ in range(count - 2)]
    return [*found, ("publish", chance.uniform(0, 3))]  # its end, and Python's own


SHOTS = [
    (prefect, number, step, delay)
    for seed, (prefect, count) in enumerate([(False, 6), (True, 4)])
    for index, (step, delay) in enumerate(moments(20261124 + seed, count))
    for number in [(signal.SIGINT, signal.SIGTERM)[(index + seed) % 2]]
]


@pytest.mark.parametrize(
    ("prefect", "number", "step", "delay"),
    SHOTS,
    ids=[
        f"{'prefect' if prefect else 'loop'}-{number.name}-{step or 'start'}-{delay:.2f}"
        for prefect, number, step, delay in SHOTS
    ],
)
def test_no_interruption_is_lost(
    tmp_path: Path, model: Path, prefect: bool, number: signal.Signals, step: str | None, delay: float
) -> None:
    project = lay_out(tmp_path / "project", model)
    code, before, output = shot(project, prefect, number, step, delay)
    published = any(line.startswith(("done     publish", "cached   publish")) for line in before)
    if published:
        assert code in (0, 130), output
    elif before or (project.folder / ".camera").exists():
        assert code == 130, output
        assert "run the same command again to go on from here" in output
    else:
        assert code in (130, -number), output

    assert project.run(overrides=TRACKED[1:]) == 0, project.told["error"]
    finished = [line.split(maxsplit=1)[1] for line in before if line.startswith("done ")]
    states = project.told["states"]
    assert [name for name in STEPS if any(told.startswith(f"{name} in ") for told in finished)] == [
        name for name in STEPS[: len(finished)] if states[name] == "cached"
    ]


def shot(
    project: Project, prefect: bool, number: signal.Signals, step: str | None, delay: float
) -> tuple[int, list[str], str]:
    """Run and signal; the exit code, the lines printed before the signal, and the whole output."""
    how = ["run", "recipe.yaml", *TRACKED, *([] if prefect else ["--no-prefect"])]
    process = subprocess.Popen(
        [sys.executable, "-m", "camera", *how],
        cwd=project.folder,
        env=environment(PREFECT_HOME=str(project.folder / "prefect"), PYTHONUNBUFFERED="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines: list[str] = []
    begun = threading.Event()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if line.startswith(f"running  {step}\n"):
                begun.set()

    reader = threading.Thread(target=read)
    reader.start()
    wait_for(lambda: step is None or begun.is_set() or process.poll() is not None, 300)
    time.sleep(delay)
    before = list(lines)
    process.send_signal(number)
    try:
        code = process.wait(timeout=120)
    finally:
        process.kill()
        reader.join()
    return code, before, "".join(lines)


def wait_for(holds: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.002)
