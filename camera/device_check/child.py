"""The process of one step: `python -m camera.device_check.child MODULE FINDINGS SCRATCH`, what it is given as a line on stdin.

It ends with the process that started it: then stdin, which that one holds open, comes to its end.
"""

import faulthandler
import importlib
import os
import signal
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from camera.device_check.context import Context
from camera.options import CheckOptions
from camera.results import Result


class Given(Result):
    """What comes on stdin."""

    options: CheckOptions
    arguments: dict[str, Any]
    """Of the module's `run`."""


def main() -> None:
    """Run the step and leave without the interpreter's end, in which a lost device may hang or crash."""
    module, findings, scratch = sys.argv[1:]
    faulthandler.enable()
    # Not by sys.stdin, whose lock the waiting thread would hold when the interpreter is asked for it.
    stdin = os.fdopen(os.dup(0), "rb", buffering=0)
    given = Given.model_validate_json(stdin.readline())
    threading.Thread(target=_end_with, args=(stdin.fileno(),), daemon=True).start()
    context, code = Context(given.options, Path(findings), Path(scratch)), 0
    try:
        importlib.import_module(module).run(context, **given.arguments)
        context.finish()
    except Exception as error:  # whatever it is, it is what the step found
        traceback.print_exc()
        context.fail(f"{type(error).__name__}: {error}")
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _end_with(descriptor: int) -> None:
    """Wait for the end of the process that holds the other end, and end this one with all that it started."""
    while os.read(descriptor, 1):
        pass
    for one in psutil.Process().children(recursive=True):  # some have groups of their own
        with suppress(psutil.NoSuchProcess):
            one.kill()
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    main()
