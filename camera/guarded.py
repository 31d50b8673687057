"""Work on what a stranger wrote, in a child process: it costs bounded memory and time, and a signal ends it at once.

Native libraries panic, abort, backtrack for ever or take all memory over a file that was made for it, and while they are
at work no signal handler of Python's runs. A forked child has what its parent has loaded, begins within milliseconds,
and dies alone. This is a limit and no sandbox: a file that takes over the library takes over the child.
"""

import contextlib
import gc
import logging
import math
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from typing import Any, Generic, NoReturn, ParamSpec, TypeVar

import psutil

from camera import shutdown
from camera.errors import CameraError
from camera.units import bytes_text

P = ParamSpec("P")
R = TypeVar("R")

_STARVED = 5
"""So many times the seconds of computing may pass while others use the machine."""
_LOOK_SECONDS = 0.1
_LONGEST_WORDS = 400
_PR_SET_PDEATHSIG = 1
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)


@dataclass(frozen=True)
class Limits:
    """What one call may cost."""

    memory_bytes: int = 1 << 29
    """Beyond what this process has."""
    seconds: float = 30
    """Of computing."""


class Guarded(Generic[P, R]):
    """A function that runs in a child of this process, call after call, for as long as none goes wrong.

    The child is forked at the first call and has what the function needs; arguments and results are pickled. No thread
    but the caller's lives on in it, so the function must use no device and no other thread's locks. Where the system
    forks and limits nothing (not Linux), the function runs here.
    """

    def __init__(
        self, function: Callable[P, R], subject: str, limits: Callable[P, Limits] = lambda *_, **__: Limits()
    ) -> None:
        """Args:
        function: what to run.
        subject: what it works on, for messages: a file or folder. It may be set before a call.
        limits: of a call, by its arguments.
        """
        self._function, self.subject, self._limits = function, subject, limits
        self._child: psutil.Process | None = None
        self._forked_by = threading.current_thread()
        self._connection: Connection[Any, Any] | None = None

    def __call__(self, *arguments: P.args, **named: P.kwargs) -> R:
        """Raises:
        CameraError: that the function raises; or one that names the subject, if it raises anything else, panics, dies,
            or needs more memory or time than it may.
        """
        limits = self._limits(*arguments, **named)
        if sys.platform != "linux":
            done, result = _answer(self._function, arguments, named, limits)
        else:
            try:
                done, result = self._ask((arguments, named, limits), limits)
            except BaseException:
                self.close()
                raise
        if done:
            return result  # type: ignore[no-any-return]
        self.close()  # what panicked is not asked again
        raise result if isinstance(result, CameraError) else CameraError(f"{self.subject}: {result}")

    def __enter__(self) -> "Guarded[P, R]":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child; another call forks another."""
        connection, child = self._connection, self._child
        self._connection = self._child = None
        if connection is not None:
            connection.close()
        if child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGKILL)
            _status(child.pid)

    def _ask(self, question: Any, limits: Limits) -> tuple[bool, Any]:
        """The child's answer: whether it is a result, and it."""
        while True:
            if self._connection is None or self._child is None:
                self._start()
            assert self._connection is not None
            assert self._child is not None
            try:
                self._connection.send(question)
                self._wait(self._connection, self._child, limits)
                answer: tuple[bool, Any] = self._connection.recv()
                return answer
            except (EOFError, OSError, psutil.NoSuchProcess):
                status, self._child = _status(self._child.pid), None
                if status == signal.SIGKILL.name and not self._forked_by.is_alive():
                    self.close()  # the system ends the child with the thread that forked it
                    continue
                return (
                    False,
                    f"the library that reads it died ({status}), as of too little memory; {_room(limits)}",
                )

    def _start(self) -> None:
        self._forked_by = threading.current_thread()
        try:
            self._child, self._connection = _fork(self._function)
        except OSError as error:
            raise CameraError(
                f"{self.subject} is read in a process of its own, and none could be started ({error.strerror}): end what "
                "else runs, or raise the limits that `ulimit -a` shows, and run again"
            ) from None

    def _wait(self, connection: "Connection[Any, Any]", child: psutil.Process, limits: Limits) -> None:
        """Until there is an answer, in Python, where signals are obeyed."""
        computed = _computed(child)
        looks = math.ceil(_STARVED * limits.seconds / _LOOK_SECONDS)
        for _ in range(looks):  # a clock would go on while a terminal or scheduler has this process stopped
            if connection.poll(_LOOK_SECONDS):
                return
            shutdown.check()  # in a thread that is not the main one
            if _computed(child) - computed > limits.seconds:
                break
        raise CameraError(
            f"{self.subject}: no end after {limits.seconds:.0f} seconds of computing: a pattern or loop in it "
            "may have none. Look at what it is, or take less of it"
        )


def run_guarded(function: Callable[[], R], subject: str, limits: Limits | None = None) -> R:
    """Run a function once in a child process; see `Guarded`."""
    with Guarded(function, subject, lambda: limits or Limits()) as guarded:
        return guarded()


@contextlib.contextmanager
def panics_are_errors(subject: str) -> Iterator[None]:
    """Make a CameraError of the panic of a library written in Rust, which is no Exception, in this process.

    What it was at is over, and what others are at goes on: the next recipe of a night.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise CameraError(f"{subject}: {_gave_up(error)}: a file that it read is damaged") from error


def _gave_up(error: BaseException) -> str:
    return f"the library that reads it gave up ({str(error)[:_LONGEST_WORDS]})"


def _fork(function: Callable[..., Any]) -> "tuple[psutil.Process, Connection[Any, Any]]":
    ours, theirs = Pipe()
    parent = os.getpid()
    before = signal.pthread_sigmask(
        signal.SIG_BLOCK, _SIGNALS
    )  # no handler of the parent's runs in the child
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # about threads: see `Guarded`
            child = os.fork()
        if child == 0:
            _serve(function, theirs, parent, before)
    except OSError:
        ours.close()
        theirs.close()
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()
    return psutil.Process(child), ours


def _status(child: int) -> str:
    """How a child ended that is at its end."""
    try:
        _, status = os.waitpid(child, 0)
    except ChildProcessError:  # the system collects them by itself
        return "ended"
    code = os.waitstatus_to_exitcode(status)
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _computed(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _room(limits: Limits) -> str:
    return (
        f"it may take {bytes_text(limits.memory_bytes)} beyond what the process has. Look at what it is, or take "
        "less of it"
    )


def _answer(
    function: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any], limits: Limits
) -> tuple[bool, Any]:
    try:
        return True, function(*arguments, **named)
    except CameraError as error:
        return False, error
    except (KeyboardInterrupt, SystemExit):
        raise
    except MemoryError:
        return False, f"it needs too much memory; {_room(limits)}"
    except Exception as error:
        return False, str(error)[:_LONGEST_WORDS] or type(error).__name__
    except BaseException as error:  # a panic of a library written in Rust
        return False, _gave_up(error)


def _serve(
    function: Callable[..., Any], connection: "Connection[Any, Any]", parent: int, mask: set[Any]
) -> NoReturn:
    """What the child does, to its end."""
    try:
        _become_a_child(connection.fileno(), parent, mask)
        while True:
            arguments, named, limits = connection.recv()
            with _limited(limits):
                answer = _answer(function, arguments, named, limits)
            del arguments, named
            connection.send(answer)
    finally:  # also if the parent has closed its end
        os._exit(1)


def _become_a_child(kept: int, parent: int, mask: set[Any]) -> None:
    """No signal of the terminal's, no file but the pipe, nothing said, and no life after the parent's."""
    import ctypes
    import resource

    signal.set_wakeup_fd(-1)
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # the parent decides
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(nowhere, descriptor)
    for descriptor in map(
        int, os.listdir("/proc/self/fd")
    ):  # of those that there may be are a billion in containers
        if descriptor > 2 and descriptor != kept:
            with contextlib.suppress(OSError):
                os.close(descriptor)
    sys.stdout = sys.stderr = open(1, "w", closefd=False)  # noqa: SIM115 (those of before may be locked by a thread)
    logging.disable(logging.CRITICAL)  # a handler may wait for a thread that is not here
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    gc.disable()  # it would copy what the parent has
    gc.freeze()


@contextlib.contextmanager
def _limited(limits: Limits) -> Iterator[None]:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = int(psutil.Process().memory_info().vms) + limits.memory_bytes
    known = [limit for limit in (wanted, soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(known), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
