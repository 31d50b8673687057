"""Graceful shutdown: SIGINT and SIGTERM stop the work where it is, and no library loses them.

Python runs a signal handler at the next line of Python, wherever that is. During garbage collection that line is in a
destructor or a weak-reference callback (SQLAlchemy, below MLflow, has hundreds), where an exception is printed and
dropped: the run would go on to its end. So `sys.unraisablehook` raises it again a moment later, and `check`, called
between steps and layers, raises again what a library caught. A process that has not ended five seconds later, or whose
main thread does not come back from a native call, is ended by `camera.watchdog`.
"""

import atexit
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from camera import watchdog

EXIT_CODE = 130
_RAISE_AGAIN_SECONDS = 0.05
_SHOW_CURSOR = b"\x1b[?25h"

_installed = False
_requested_at: float | None = None
_final_code: int | None = None
"""The exit code once all work is done and only the interpreter's own shutdown is left."""
_exit_at_once = False


def install() -> None:
    """Handle SIGINT and SIGTERM: the first raises KeyboardInterrupt, a second ends the process at once."""
    global _installed
    _installed = True
    signal.signal(signal.SIGINT, _on_signal)
    signal.signal(signal.SIGTERM, _on_signal)
    shown = sys.unraisablehook

    def dropped(what: "sys.UnraisableHookArgs") -> None:
        if not (issubclass(what.exc_type, KeyboardInterrupt) and requested()):
            shown(what)
        elif _final_code is None and _in_main_thread():
            # Not raised here: this still runs inside what drops it.
            signal.signal(signal.SIGALRM, _raise_again)
            signal.setitimer(signal.ITIMER_REAL, _RAISE_AGAIN_SECONDS)

    sys.unraisablehook = dropped
    watchdog.watch(_terminate, requested)
    atexit.register(_exit_with_final_code)


def reinstall() -> None:
    """Take SIGTERM back from Prefect, which replaces the handler inside a flow; without `install` it is left to Prefect."""
    if _installed and _in_main_thread() and _final_code is None:
        signal.signal(signal.SIGTERM, _on_signal)
        watchdog.watch(_terminate, requested)


@contextmanager
def watched() -> Iterator[None]:
    """A block whose SIGTERM another handler takes, as Prefect's in a deployment run: if it cannot run, the process ends.

    With `install`, and in other threads than the main one, this does nothing.
    """
    if _installed or not _in_main_thread():
        yield
        return
    with watchdog.watching(_terminate):
        yield


def requested() -> bool:
    """Whether a signal asked this process to stop, whatever became of the exception."""
    return _requested_at is not None


def check() -> None:
    """Raise KeyboardInterrupt if a signal came and its exception was dropped; call it wherever work can stop."""
    if requested():
        raise KeyboardInterrupt


@contextmanager
def checked() -> Iterator[None]:
    """`check` before and after a block, also if a library turned the interrupt into another error."""
    check()
    try:
        yield
    finally:
        check()


@contextmanager
def exit_at_once() -> Iterator[None]:
    """A block of imports and checks with nothing to clean up: a signal ends the process at once.

    An exception would not do: torch, for one, takes a KeyboardInterrupt while it imports numpy for a missing numpy,
    and goes on without.
    """
    global _exit_at_once
    _exit_at_once = True
    try:
        yield
    finally:
        _exit_at_once = False


def finish(code: int) -> None:
    """All work is done and shown: from now on a signal ends the process at once with this exit code."""
    global _final_code
    _final_code = code
    _flush()
    if _installed:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _requested_at
    now = time.monotonic()
    if _final_code is not None:
        os._exit(_final_code)
    if _exit_at_once:
        _terminate("stopped")
    if _requested_at is None:
        _requested_at = now
        raise KeyboardInterrupt
    if now - _requested_at > watchdog.SAME_SIGNAL_SECONDS:
        _terminate("stopped at once")


def _raise_again(number: int, frame: FrameType | None) -> None:
    if _final_code is None:
        raise KeyboardInterrupt


def _terminate(how: str) -> None:
    """End without cleaning up: finished artifacts are in the store, and a stage resumes as after a kill."""
    if _final_code is not None:
        os._exit(_final_code)
    if os.isatty(1):
        _say(1, _SHOW_CURSOR)  # a live display hides it
    _say(2, f"{how}; run the same command again to go on from here\n".encode())
    watchdog.end_children()
    os._exit(EXIT_CODE)


def _say(descriptor: int, text: bytes) -> None:
    """Write only what does not wait: a pager that shows its first page reads no further, a terminal may be held."""
    with suppress(OSError, ValueError):  # nobody reads any more
        if select.select([], [descriptor], [], 0)[1]:
            os.write(descriptor, text)


def _exit_with_final_code() -> None:
    """Exit as the last atexit callback (it is registered first).

    The interpreter's own shutdown takes a second, in which a signal would kill the process; and `python -m` ends with
    SIGINT if one came within an `exec` of source text, caught or not (dataclasses are made so).
    """
    if _final_code is not None:
        _flush()
        os._exit(_final_code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # a pipe whose reader is gone
            stream.flush()


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
