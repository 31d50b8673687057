import os
import signal
import subprocess
import sys

import pytest

DROPPED = """
import contextlib, os, signal
from flows import interruption

interruption.listen()
interruption.stop_if_told()  # nobody has said anything yet
with contextlib.suppress(KeyboardInterrupt):  # as a destructor does, or an import that is tried
    os.kill(os.getpid(), signal.{signal})
print("went on", flush=True)
interruption.stop_if_told()
print("and on")
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interruption_that_was_dropped_stops_the_run_before_its_next_step(name: str):
    done = subprocess.run(
        [sys.executable, "-c", DROPPED.format(signal=name)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        check=False,
    )
    assert done.stdout == "went on\n"
    assert done.returncode == -signal.SIGINT, done.stderr
