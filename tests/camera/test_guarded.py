"""What a stranger's file costs is bounded: the child that reads it may panic, die, hang or grow, and this process goes on."""

import contextlib
import os
import signal
import subprocess
import sys
import time
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
    return [each.pid for each in psutil.Process().children()]


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
        run_guarded(lambda: grow(80 << 20), "x", limits)


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


SCRIPT = """
import sys, time
from camera import shutdown
from camera.guarded import run_guarded
shutdown.install()
print("ready", flush=True)
try:
    run_guarded(lambda: time.sleep(60), "x")
except KeyboardInterrupt:
    sys.exit(130)
"""


def started() -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
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
