"""Being told to stop: never forgotten, at once when it is said twice, and with the exit code that scripts expect."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

BOTH = pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
BEGIN = """
import contextlib, os, signal, sys, time, weakref
from camera import shutdown

def tell(name):
    os.kill(os.getpid(), getattr(signal, name))

class Thing:
    pass

shutdown.install()
name = sys.argv[1]
"""


NOT_INSTALLED = BEGIN.replace("shutdown.install()", "")


def run(script: str, *arguments: str, begin: str = BEGIN) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", begin + script, *arguments],
        capture_output=True, text=True, env=environment(), timeout=60, check=False,
    )  # fmt: skip


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": ""}


@BOTH
def test_what_was_caught_and_kept_stops_the_run_before_its_next_step(name: str) -> None:
    done = run(
        """
shutdown.check()  # nobody has said anything yet
with contextlib.suppress(KeyboardInterrupt):  # as an import does that is tried and given up
    tell(name)
print("went on", flush=True)
shutdown.check()
print("and on")
""",
        name,
    )
    assert done.stdout == "went on\n"
    assert done.returncode == -signal.SIGINT, done.stderr


@BOTH
@pytest.mark.parametrize("where", ["callback", "destructor"])
def test_what_was_raised_while_an_object_is_collected_is_raised_again_in_the_work_that_goes_on(
    name: str, where: str
) -> None:
    done = run(
        """
if sys.argv[2] == "callback":
    thing = Thing()
    seen = weakref.ref(thing, lambda _: tell(name))
else:
    class Last:
        def __del__(self):
            tell(name)
    thing = Last()
del thing
print("went on", flush=True)
began = time.monotonic()
try:
    while time.monotonic() < began + 30:
        sum(range(1000))
except KeyboardInterrupt:
    print("stopped" if time.monotonic() < began + 5 else "late")
""",
        name,
        where,
    )
    assert done.stdout == "went on\nstopped\n", done.stderr
    assert "Exception ignored" not in done.stderr, "it is not ignored"


def test_a_chain_of_destructors_cannot_wear_it_out() -> None:
    done = run(
        """
class Slow:
    def __del__(self):
        if not shutdown.requested():
            tell(name)
        time.sleep(0.2)  # long enough for the next time to come within it
things = [Slow() for _ in range(5)]
try:
    things.clear()
    time.sleep(20)
    print("forgotten")
except KeyboardInterrupt:
    print("stopped")
""",
        "SIGINT",
    )
    assert done.stdout == "stopped\n", done.stderr


def test_what_another_destructor_says_is_still_shown() -> None:
    done = run(
        """
class Bad:
    def __del__(self):
        raise ValueError("of its own")
Bad()
""",
        "SIGINT",
    )
    assert done.returncode == 0
    assert "ValueError: of its own" in done.stderr


CLEANING = """
try:
    print("at work", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("cleaning", flush=True)
    time.sleep(float(sys.argv[1]))
    print("clean", flush=True)
"""


@BOTH
def test_the_second_time_ends_at_once_with_130(name: str) -> None:
    number = getattr(signal, name)
    with started(CLEANING, "60") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "at work\n"
        process.send_signal(number)
        assert process.stdout.readline() == "cleaning\n"
        time.sleep(0.7)
        began = time.monotonic()
        process.send_signal(number)
        assert process.wait(timeout=30) == 130
        assert time.monotonic() - began < 5
        assert process.stderr is not None
        assert "stopped at once" in process.stderr.read()


def test_two_signals_in_a_moment_are_one() -> None:
    with started(CLEANING, "1") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "at work\n"
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
        assert process.stdout.read() == "cleaning\nclean\n"


def test_a_signal_after_all_work_is_done_changes_no_exit_code_and_waits_for_nothing() -> None:
    with started('print("done")\nshutdown.finish(3)\ntime.sleep(60)', "") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "done\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 3


def test_before_anything_has_begun_it_ends_at_once_whatever_an_import_makes_of_it() -> None:
    done = run(
        """
with shutdown.exit_at_once():
    with contextlib.suppress(KeyboardInterrupt):
        tell(name)
    print("went on")
""",
        "SIGINT",
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert "stopped; run the same command again" in done.stderr


def test_the_exit_code_is_ours_wherever_the_signal_came(tmp_path: Path) -> None:
    def code(end: str) -> int:
        script = f'try:\n    exec("tell(name)")\nexcept KeyboardInterrupt:\n    {end}\n    sys.exit(130)\n'
        (tmp_path / "program.py").write_text(BEGIN + script)
        command = [sys.executable, "-m", "program", "SIGINT"]
        return subprocess.run(command, cwd=tmp_path, env=environment(), timeout=60, check=False).returncode

    assert code("pass") == -signal.SIGINT, "Python's own doing"
    assert code("shutdown.finish(130)") == 130


def test_what_python_tears_down_after_its_end_cannot_change_the_exit_code() -> None:
    done = run(
        """
import atexit
class Last:
    def __del__(self):
        tell(name)
last = Last()
atexit.register(print, "at exit")
shutdown.finish(3)
""",
        "SIGTERM",
    )
    assert (done.returncode, done.stdout) == (3, "at exit\n"), done.stderr


def test_work_that_makes_another_error_of_it_does_not_hide_it() -> None:
    done = run(
        """
try:
    with shutdown.checked():
        try:
            tell(name)
        except KeyboardInterrupt:
            raise ValueError("what a library makes of it")
except KeyboardInterrupt:
    print("stopped")
""",
        "SIGINT",
    )
    assert done.stdout == "stopped\n", done.stderr


def test_sigterm_is_taken_back_from_a_flow_and_left_to_a_worker() -> None:
    script = """
def other(number, frame): ...
signal.signal(signal.SIGTERM, other)
shutdown.reinstall()
print(signal.getsignal(signal.SIGTERM) is not other)
"""
    assert run(script, "").stdout == "True\n"
    assert run(script, "", begin=NOT_INSTALLED).stdout == "False\n"


BUSY = """
import hashlib
print("at work", flush=True)
try:
    hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000_000)  # one native call of half a minute
except KeyboardInterrupt:
    print("late")
"""


@BOTH
def test_a_native_call_is_ended_in_seconds_with_130(name: str) -> None:
    with started(BUSY, "") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "at work\n"
        time.sleep(0.3)
        began = time.monotonic()
        process.send_signal(getattr(signal, name))
        assert process.wait(timeout=30) == 130
        assert time.monotonic() - began < 5
        assert process.stdout.read() == ""
        assert "stopped; run the same command again" in process.stderr.read()


def test_a_pipe_that_nobody_empties_holds_no_process_that_is_told_to_stop() -> None:
    fills = """
from camera import watchdog
watchdog.TO_END_SECONDS = 0.5
os.set_blocking(2, False)
with contextlib.suppress(BlockingIOError):
    while True:
        os.write(2, b"x" * 4096)
os.set_blocking(2, True)  # as of a pager that shows its first page
print("full", flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    os.write(2, b"stopped")
"""
    with started(fills, "") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "full\n"
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(timeout=10) == 130
        finally:
            process.kill()


WATCHED = (
    NOT_INSTALLED
    + """
import threading
from camera import watchdog
watchdog.TO_HANDLE_SECONDS = 0.5

class Told(BaseException):
    pass

def other(number, frame):
    if name == "raises":
        raise Told
    print("told", flush=True)

number = signal.SIGINT if name == "interrupt" else signal.SIGTERM
if number == signal.SIGTERM:
    signal.signal(number, other)

def computes():
    while True:
        pass

def soon():
    threading.Timer(0.2, lambda: os.kill(os.getpid(), number)).start()
"""
)


@pytest.mark.parametrize("handler", ["raises", "returns", "interrupt"])
def test_a_native_call_ends_a_process_with_the_handlers_of_another(handler: str) -> None:
    script = "with shutdown.watched():\n    soon()" + BUSY.replace("\n", "\n    ")
    done = run(script, handler, begin=WATCHED)
    assert (done.returncode, done.stdout) == (130, "at work\n"), done.stderr
    assert "stopped; run the same command again" in done.stderr


@pytest.mark.parametrize("at_work", ["time.sleep(60)", "computes()"])
def test_a_handler_that_ran_may_take_its_time(at_work: str) -> None:
    script = """
with shutdown.watched():
    soon()
    try:
        AT_WORK
    except Told:
        time.sleep(1)  # one answer of a server
        os.kill(os.getpid(), signal.SIGURG)
        print("clean")
""".replace("AT_WORK", at_work)
    done = run(script, "raises", begin=WATCHED)
    assert (done.returncode, done.stdout) == (0, "clean\n"), done.stderr


def test_a_handler_that_returns_to_the_same_wait_ran_too() -> None:
    script = """
with shutdown.watched():
    soon()
    threading.Event().wait(1.2)
print("done")
"""
    done = run(script, "returns", begin=WATCHED)
    assert (done.returncode, done.stdout) == (0, "told\ndone\n"), done.stderr


def test_nothing_is_watched_after_the_block_and_all_is_as_before() -> None:
    script = """
reading, writing = os.pipe()
os.set_blocking(writing, False)
signal.set_wakeup_fd(writing)  # another library's
open_before = len(os.listdir("/dev/fd"))
with shutdown.watched(), shutdown.watched():
    assert len(os.listdir("/dev/fd")) == open_before + 2
for _ in range(2):
    soon()
    threading.Event().wait(1.2)
assert signal.set_wakeup_fd(-1) == writing
assert len(os.listdir("/dev/fd")) == open_before
assert signal.getsignal(signal.SIGURG) == signal.SIG_DFL
assert os.read(reading, 9) == bytes([signal.SIGTERM]) * 2
assert not [thread for thread in threading.enumerate() if thread.name == "watchdog"]
"""
    done = run(script, "returns", begin=WATCHED)
    assert (done.returncode, done.stdout) == (0, "told\ntold\n"), done.stderr


def test_without_install_a_flow_leaves_the_signals_of_its_process_alone() -> None:
    script = """
shutdown.reinstall()
assert signal.set_wakeup_fd(-1) == -1
for _ in range(2):  # cells of a notebook
    soon()
    with contextlib.suppress(KeyboardInterrupt):
        time.sleep(60)
    time.sleep(0.7)
print("alive")
"""
    done = run(script, "interrupt", begin=WATCHED)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


def started(script: str, argument: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", BEGIN + script, argument],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
