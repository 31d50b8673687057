"""Being told to stop, so that it is neither forgotten nor waited for.

Python runs a signal's handler at the next line of Python, wherever that is. While objects are collected, that line is
in a destructor or in the callback of a weak reference (SQLAlchemy, below MLflow, has such callbacks by the hundred),
and what is raised there is shown and dropped: a run would go on to its end as if nothing had been said. So it is
raised again a moment later. What a library catches and keeps to itself is raised again at the next step or layer.
"""

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

EXIT_CODE = 130
_AGAIN_SECONDS = 0.05
_SAME_SECONDS = 0.5
"""Two signals within this time are one: whoever ends a group of processes, as `timeout` does, may send two."""
_SHOW_CURSOR = b"\x1b[?25h"

_listens = False
_told: float | None = None
"""When."""
_over: int | None = None
"""The exit code, once all work is done and only Python's own end is left."""
_nothing_begun = False


def listen() -> None:
    """Take Ctrl-C and a polite kill alike: the stage stops where it is and resumes there; the second ends at once."""
    global _listens
    _listens = True
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    shown = sys.unraisablehook

    def dropped(what: "sys.UnraisableHookArgs") -> None:
        ours = issubclass(what.exc_type, KeyboardInterrupt) and was_told()
        if not ours:
            shown(what)
        elif _over is None and _in_main_thread():
            # Not here: this is still within what drops it.
            signal.signal(signal.SIGALRM, _again)
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)

    sys.unraisablehook = dropped
    atexit.register(_leave)


def keep_listening() -> None:
    """Take SIGTERM back from Prefect, which puts its own handler in place for a flow; in a worker that one stays."""
    if _listens and _over is None and _in_main_thread():
        signal.signal(signal.SIGTERM, _interrupt)


def was_told() -> bool:
    """Whether it was said, whatever became of the exception."""
    return _told is not None


def stop_if_told() -> None:
    """Raise KeyboardInterrupt if one was raised before and dropped; call it wherever a run can stop."""
    if was_told():
        raise KeyboardInterrupt


@contextmanager
def heeded() -> Iterator[None]:
    """Some work before and after which a run can stop, even if a library made another error of the interruption."""
    stop_if_told()
    try:
        yield
    finally:
        stop_if_told()


@contextmanager
def starting() -> Iterator[None]:
    """Imports and checks, which leave nothing to clean up: a signal ends the process at once.

    An exception would not do: torch, for one, takes a KeyboardInterrupt in its import of numpy for a numpy that is
    not installed, and goes on without.
    """
    global _nothing_begun
    _nothing_begun = True
    try:
        yield
    finally:
        _nothing_begun = False


def wind_down(code: int) -> None:
    """All work is done and shown: from now on a signal ends the process at once, with the code it would end with."""
    global _over
    _over = code
    _write_out()
    if _listens:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _told
    now = time.monotonic()
    if _over is not None:
        os._exit(_over)
    if _nothing_begun:
        _end_at_once("stopped")
    if _told is None:
        _told = now
        raise KeyboardInterrupt
    if now - _told > _SAME_SECONDS:
        _end_at_once("stopped at once")


def _again(number: int, frame: FrameType | None) -> None:
    if _over is None:
        raise KeyboardInterrupt


def _end_at_once(how: str) -> None:
    """End without cleaning up: what is finished is in the store, and a stage resumes as after a kill."""
    if os.isatty(1):
        os.write(1, _SHOW_CURSOR)  # a live display hides it
    os.write(2, f"{how}; run the same command again to go on from here\n".encode())
    os._exit(EXIT_CODE)


def _leave() -> None:
    """End with the exit code, as the last of what runs at exit (it is registered first).

    What Python does after that takes a second, in which a signal would kill the process; and `python -m` ends itself
    by SIGINT if one came within an `exec` of a text, caught or not (dataclasses are made so).
    """
    if _over is not None:
        _write_out()
        os._exit(_over)


def _write_out() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # of a pipe whose reader has gone
            stream.flush()


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
