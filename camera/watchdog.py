"""A thread that ends the process after a signal whose handler cannot run: the main thread is in a native call.

Python runs a handler when the main thread comes back from the library that it called: a text is tokenised, or a matrix
factorised, first. The system's part of a handler writes to a pipe at once, and a thread that waits there needs the main
thread for nothing. What it cannot end is a call that keeps Python's lock (docs/limits.md).
"""

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

SAME_SIGNAL_SECONDS = 0.5
"""Two signals within this time are one: whoever ends a process group, as `timeout` does, may send two."""
TO_HANDLE_SECONDS = 2.5
"""How long the main thread may take to come back to Python."""
TO_END_SECONDS = 4.5
"""How long the process may take to end after it has."""
_LOOK_SECONDS = 0.1
_NUMBERS = (signal.SIGINT, signal.SIGTERM)
_QUESTION = signal.SIGURG
"""What nobody sends, and what does nothing where it is not handled."""
_NO_MORE = 0
"""No signal's number: in the pipe it ends the watching."""
_pipe: tuple[int, int] | None = None


def watch(end: Callable[[str], None], handled: Callable[[], bool]) -> None:
    """Watch for SIGINT and SIGTERM from now on, or take their pipe back from a library. Call it in the main thread.

    Args:
        end: ends the process; called in the watching thread with how it was stopped.
        handled: whether the handler ran.
    """
    pipe = _pipe
    if pipe is None:
        pipe, _ = _start(lambda reading: _watch(reading, end, handled))
    signal.set_wakeup_fd(pipe[1], warn_on_full_buffer=False)


@contextmanager
def watching(end: Callable[[str], None]) -> Iterator[None]:
    """Watch within a block, until whatever handlers are there have run. Call it in the main thread.

    They stay in place: Prefect cancels a run only where it finds its own. So the main thread is asked by another signal,
    which Python handles after these. Not watched is a block within another, and one where a library took that signal.
    """
    if _pipe is not None or signal.getsignal(_QUESTION) != signal.SIG_DFL:
        yield
        return
    answers: list[int] = []
    signal.signal(_QUESTION, lambda number, frame: answers.append(number))
    pipe, thread = _start(lambda reading: _ask(reading, end, answers))
    before = signal.set_wakeup_fd(pipe[1], warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        _stop(pipe, thread)
        signal.signal(_QUESTION, signal.SIG_DFL)


def _start(work: Callable[[int], None]) -> tuple[tuple[int, int], threading.Thread]:
    global _pipe
    _pipe = os.pipe()
    os.set_blocking(_pipe[1], False)
    thread = threading.Thread(target=work, args=(_pipe[0],), name="watchdog", daemon=True)
    thread.start()
    return _pipe, thread


def _stop(pipe: tuple[int, int], thread: threading.Thread) -> None:
    global _pipe
    os.write(pipe[1], bytes([_NO_MORE]))
    thread.join()
    _pipe = None
    for descriptor in pipe:
        os.close(descriptor)


def _watch(reading: int, end: Callable[[str], None], handled: Callable[[], bool]) -> None:
    first: float | None = None
    while True:
        ready, _, _ = select.select([reading], [], [], None if first is None else _LOOK_SECONDS)
        now = time.monotonic()
        if ready and any(number in _NUMBERS for number in os.read(reading, 64)):
            if first is None:
                first = now
            elif now - first > SAME_SIGNAL_SECONDS:
                time.sleep(_LOOK_SECONDS)  # the handler ends it itself, if it can run
                end("stopped at once")
        if first is not None and now - first > (TO_END_SECONDS if handled() else TO_HANDLE_SECONDS):
            end("stopped")


def _ask(reading: int, end: Callable[[str], None], answers: list[int]) -> None:
    main = threading.main_thread().ident or 0
    first: float | None = None
    while not answers:
        ready, _, _ = select.select([reading], [], [], None if first is None else _LOOK_SECONDS)
        now = time.monotonic()
        numbers = os.read(reading, 64) if ready else b""
        if _NO_MORE in numbers:
            return
        told = any(number in _NUMBERS for number in numbers)
        if first is None:
            first = now if told else None
        elif now - first > TO_HANDLE_SECONDS and not answers:
            end("stopped")
        if told or not ready:  # and not for the question's own number
            signal.pthread_kill(main, _QUESTION)


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
