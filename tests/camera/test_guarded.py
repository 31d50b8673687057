"""What a stranger's file costs is bounded: the child that reads it may panic, die, hang or grow, and this process goes on."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Split

from camera.errors import CameraError, NetworkError
from camera.guarded import Guarded, Limits, panics_are_errors, run_guarded
from tests.conftest import REPOSITORY


def children() -> list[int]:
    """Of this process, but for the servers that other tests fork processes from."""
    found = psutil.Process().children()
    return [each.pid for each in found if not any("multiprocessing" in word for word in each.cmdline())]


def test_it_has_what_this_process_has_and_gives_back_what_it_made() -> None:
    here = os.getpid()
    seen = {"of the parent": 1}
    with Guarded(lambda more: (os.getppid(), {**seen, **more}), "x") as guarded:
        assert guarded({"text": "\ud800 é"}) == (here, {"of the parent": 1, "text": "\ud800 é"})
        first = children()
        assert guarded({}) == (here, seen)
        assert children() == first, "one child serves all calls"
    assert not set(first) & set(children())


def test_errors_of_ours_come_as_they_are_and_others_name_the_subject() -> None:
    def fail(error: BaseException) -> None:
        raise error

    with Guarded(fail, "model/tokenizer.json") as guarded:
        with pytest.raises(NetworkError, match=r"^the hub is away$"):
            guarded(NetworkError("the hub is away"))
        with pytest.raises(CameraError, match=r"^model/tokenizer\.json: no such kind$"):
            guarded(ValueError("no such kind"))
        with pytest.raises(CameraError, match=r"model/tokenizer\.json"):
            guarded(RecursionError())
        with pytest.raises(CameraError, match="memory") as told:
            guarded(MemoryError())
        assert "take less of it" in str(told.value)


def test_a_panic_of_a_native_library_is_an_error_like_others() -> None:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = Split(Regex(r"(x+x+)+y"), "isolated")
    with pytest.raises(BaseException, match="retry-limit") as panicked:
        tokenizer.encode("x" * 30_000)
    assert not isinstance(panicked.value, Exception), "or this test tests nothing"
    with pytest.raises(CameraError, match=r"tokenizer\.json: the library that reads it gave up"):
        run_guarded(lambda: tokenizer.encode("x" * 30_000), "tokenizer.json")
    with pytest.raises(CameraError, match=r"fetch: .*gave up"), panics_are_errors("fetch"):
        tokenizer.encode("x" * 30_000)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL])
def test_the_death_of_the_child_is_an_error_and_the_next_call_has_another(number: int) -> None:
    with Guarded(lambda n: os.kill(os.getpid(), n) if n else "alive", "x") as guarded:
        with pytest.raises(CameraError, match=signal.Signals(number).name):
            guarded(number)
        assert guarded(0) == "alive"


def test_memory_is_limited_beyond_what_the_process_has() -> None:
    def grow(count: int) -> int:
        return len(bytearray(count))

    limits = Limits(memory_bytes=64 << 20)
    assert run_guarded(lambda: grow(48 << 20), "x", limits) == 48 << 20
    with pytest.raises(CameraError, match=r"may take 67\.1 MB beyond"):
        run_guarded(
            lambda: grow(4 << 30), "x", limits
        )  # more than what a heap has left over from other tests


def test_computing_without_end_is_ended() -> None:
    with pytest.raises(CameraError, match="x: no end after 1 seconds of computing"):
        run_guarded(lambda: sum(range(10**12)), "x", Limits(seconds=0.5 + 0.1))
    assert children() == []


def test_it_does_not_see_the_files_of_this_process_nor_write_to_its_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / "open").open("w") as file:
        number = file.fileno()

        def look() -> bool:
            sys.stdout.write("said")
            os.write(2, b"and said")
            with contextlib.suppress(OSError):
                os.fstat(number)
                return True
            return False

        assert run_guarded(look, "x") is False
    assert capfd.readouterr() == ("", "")


def in_a_thread(function: Callable[[], object]) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()
    time.sleep(0.1)  # until the system has ended it too


def test_it_answers_after_the_thread_that_used_it_first_has_ended() -> None:
    with Guarded(lambda x: x, "x") as guarded:
        in_a_thread(lambda: guarded(1))
        assert guarded(2) == 2


def test_it_answers_where_that_thread_ends_during_the_call() -> None:
    with Guarded(time.sleep, "x") as guarded:
        thread = threading.Thread(target=lambda: (guarded(0), time.sleep(0.3)))
        thread.start()
        while not (guarded._child and children()):
            time.sleep(0.01)
        time.sleep(0.1)
        guarded(0.5)
        thread.join(20)
        assert not thread.is_alive()


@pytest.mark.parametrize("call", ["fork", "pipe"])
def test_where_no_process_can_be_started_it_says_so_and_leaves_nothing_open(
    call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused() -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refused)
    if call == "pipe":
        monkeypatch.setattr("camera.guarded.Pipe", refused)
    before = psutil.Process().num_fds()
    with pytest.raises(CameraError, match=r"a\.parquet .*none could be started \(Resource temp.*`ulimit -a`"):
        run_guarded(lambda: 1, "a.parquet")
    assert psutil.Process().num_fds() == before


def test_it_does_not_count_through_all_files_that_a_process_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system has no call for it, that takes minutes: a container may have a limit of a billion."""

    def counted(first: int, last: int) -> None:
        assert last - first < 1000

    monkeypatch.setattr(os, "closerange", counted)
    assert run_guarded(lambda: 1, "x") == 1


def test_time_in_which_it_is_stopped_does_not_count() -> None:
    """By Ctrl-Z, or a scheduler's suspend: the child is stopped with it."""
    script = SCRIPT.replace("time.sleep(60)", "[time.sleep(0.3) for _ in range(2)]")
    with started(script.replace('"x")', '"x", Limits(seconds=0.3))')) as process:
        child = child_of(process.pid)
        for each in (child, psutil.Process(process.pid)):
            each.suspend()
        time.sleep(1.7)
        for each in (child, psutil.Process(process.pid)):
            each.resume()
        assert process.wait(timeout=20) == 0


SCRIPT = """
import sys, time
from camera import shutdown
from camera.guarded import Limits, run_guarded
shutdown.install()
print("ready", flush=True)
try:
    run_guarded(lambda: time.sleep(60), "x")
except KeyboardInterrupt:
    sys.exit(130)
"""


def started(script: str = SCRIPT) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def child_of(pid: int) -> psutil.Process:
    until = time.monotonic() + 10
    while not (found := psutil.Process(pid).children()):
        assert time.monotonic() < until
        time.sleep(0.01)
    return found[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_obeyed_while_the_child_is_at_work_and_no_child_stays(number: int) -> None:
    with started() as process:
        child = child_of(process.pid)
        time.sleep(0.2)
        begun = time.monotonic()
        os.kill(child.pid, number)  # the terminal sends it to both
        process.send_signal(number)
        assert process.wait(timeout=10) == 130
        assert time.monotonic() - begun < 2
        assert not child.is_running()


def test_the_child_dies_with_a_parent_that_is_killed() -> None:
    with started() as process:
        child = child_of(process.pid)
        process.kill()
        process.wait()
        until = time.monotonic() + 5
        while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < until
            time.sleep(0.01)
