"""Locks are exclusive or shared, leave no file behind, and are freed by the kernel when their holder dies."""

import subprocess
import sys
from pathlib import Path

import pytest

from camera.locks import LockedError, lock, output_lock, try_lock

HOLDER = """
import sys
from pathlib import Path
from camera.locks import output_lock
with output_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_is_exclusive_and_its_file_goes_with_it(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "lock"
    with lock(path):
        with pytest.raises(LockedError, match=f"{path} is locked by another process"), lock(path, wait=False):
            pass
        with try_lock(path) as free:
            assert not free
    assert not path.exists()
    with try_lock(path) as free:
        assert free


def test_many_hold_a_shared_lock_and_nobody_an_exclusive_one_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "gate"
    with lock(path, shared=True, keep=True), lock(path, shared=True, keep=True), try_lock(path) as free:
        assert not free
    assert path.exists()
    with lock(path, wait=False):
        pass


def test_who_makes_an_output_is_named_until_it_is_killed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(LockedError, match=rf"out is being made by another process \({holder.pid}\)"),
            output_lock(out),
        ):
            pass
        holder.kill()
        holder.wait()
        with output_lock(out):
            pass
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_block_is_not_taken_for_a_lock(tmp_path: Path) -> None:
    with pytest.raises(LockedError, match=r"^inner$"), output_lock(tmp_path / "out"):
        raise LockedError("inner")
