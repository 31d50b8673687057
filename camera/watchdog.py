"""A thread that ends the process after a signal whose handler cannot run: the main thread is in a native call.

Python runs a handler when the main thread comes back from the library that it called: a text is tokenised, or a matrix
factorised, first. The system's part of a handler writes to a pipe at once, and a thread that waits there needs the main
thread for nothing. What it cannot end is a call that keeps Python's lock (docs/limits.md).
"""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

SAME_SIGNAL_SECONDS = 0.5
"""Two signals within this time are one: whoever ends a process group, as `timeout` does, may send two."""
TO_HANDLE_SECONDS = 2.5
"""How long the main thread may take to come back to Python."""
TO_END_SECONDS = 4.5
"""How long the process may take to end after it has."""
_LOOK_SECONDS = 0.1
_NUMBERS = (signal.SIGINT, signal.SIGTERM)
_pipe: tuple[int, int] | None = None


def watch(end: Callable[[str], None], handled: Callable[[], bool] | None, to_end: float | None) -> None:
    """Begin to watch for SIGINT and SIGTERM, or take their pipe back from a library. Call it in the main thread.

    Args:
        end: ends the process; called in the watching thread with how it was stopped.
        handled: whether the handler ran; None: it is another's, and has run once the main thread went on.
        to_end: seconds from the first signal to the end of the process; None: however long it takes.
    """
    global _pipe
    if _pipe is None:
        _pipe = os.pipe()
        os.set_blocking(_pipe[1], False)
        threading.Thread(
            target=_watch, args=(_pipe[0], end, handled, to_end), name="watchdog", daemon=True
        ).start()
    signal.set_wakeup_fd(_pipe[1], warn_on_full_buffer=False)


def _watch(
    reading: int, end: Callable[[str], None], handled: Callable[[], bool] | None, to_end: float | None
) -> None:
    first: float | None = None
    went_on, place = False, _place()
    while True:
        ready, _, _ = select.select([reading], [], [], None if first is None else _LOOK_SECONDS)
        now = time.monotonic()
        if ready and any(number in _NUMBERS for number in os.read(reading, 64)):
            if first is None:
                first, place = now, _place()
            elif now - first > SAME_SIGNAL_SECONDS:
                time.sleep(_LOOK_SECONDS)  # the handler ends it itself, if it can run
                end("stopped at once")
        if first is None:
            continue
        went_on = handled() if handled is not None else went_on or _place() != place
        if (not went_on and now - first > TO_HANDLE_SECONDS) or (to_end is not None and now - first > to_end):
            end("stopped")


def _place() -> tuple[int, int]:
    """Where the main thread is; it stays the same as long as one native call takes."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return (id(frame), frame.f_lasti) if frame is not None else (0, 0)


def _forget() -> None:
    """In a forked child there is no thread to watch, and the pipe is the parent's."""
    global _pipe
    if _pipe is not None:
        _pipe = None
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget)


def end_children() -> None:
    """Ask the processes that this one started to end, except those with a session of their own."""
    with suppress(Exception):
        import psutil  # only on the way out

        session = os.getsid(0)
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error, OSError):
                if os.getsid(child.pid) == session:
                    child.terminate()
