"""What killed writers leave is swept by who can know that they are dead, on disks that hosts share too."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from camera import processes
from camera.files import FOREIGN_DAYS, atomic_folder, remove_stale_temporaries, temporary_sibling
from camera.processes import pid_space

ELSEWHERE = "h0123456789ab"
DAY = 86400


@pytest.fixture
def dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def names(folder: Path) -> list[str]:
    """Everything in a folder, hidden names too."""
    return sorted(path.name for path in folder.iterdir())


def changed_days_ago(path: Path, days: float) -> None:
    then = time.time() - days * DAY
    os.utime(path, (then, then))


def test_a_temporary_says_its_process_and_of_its_host_only_a_digest(tmp_path: Path) -> None:
    name = temporary_sibling(tmp_path / "x.json").name
    assert re.fullmatch(rf"\.x\.json\.h[0-9a-f]{{12}}\.{os.getpid()}\.tmp", name)
    assert temporary_sibling(tmp_path / "x.json").parent == tmp_path


def test_two_processes_of_a_host_say_the_same_host() -> None:
    code = "from camera.processes import pid_space; print(pid_space())"
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert said.strip() == pid_space()


def test_a_sweep_removes_what_dead_processes_left_and_nothing_else(tmp_path: Path, dead: int) -> None:
    here, mine = pid_space(), os.getpid()
    stays = [f".x.{here}.{mine}.tmp", "x.tmp", ".x.name.tmp", f".x.{here}.{dead}", ".hidden", "x"]
    for name in [*stays, f".x.{here}.{dead}.tmp", f".x.safetensors.{here}.{dead}.tmp"]:
        (tmp_path / name).write_text("")
    (tmp_path / f".folder.{here}.{dead}.tmp" / "deep").mkdir(parents=True)
    (tmp_path / f".folder.{here}.{mine}.tmp").mkdir()
    remove_stale_temporaries(tmp_path)
    assert names(tmp_path) == sorted([*stays, f".folder.{here}.{mine}.tmp"])


def test_names_without_a_host_are_swept_as_this_hosts(tmp_path: Path, dead: int) -> None:
    mine = os.getpid()
    for name in (f".x.{mine}.tmp", f".x.{dead}.tmp", f".x.safetensors.{dead}.tmp"):
        (tmp_path / name).write_text("")
    (tmp_path / f".folder.{dead}.tmp" / "deep").mkdir(parents=True)
    remove_stale_temporaries(tmp_path)
    assert names(tmp_path) == [f".x.{mine}.tmp"]


def test_what_another_host_writes_stays_and_goes_when_it_is_long_unchanged(tmp_path: Path, dead: int) -> None:
    young, old = f".young.{ELSEWHERE}.{dead}.tmp", f".old.{ELSEWHERE}.{dead}.tmp"
    mine = f".mine.{ELSEWHERE}.{os.getpid()}.tmp"  # a process here that has the number is another one
    for name, days in ((young, FOREIGN_DAYS - 0.1), (old, FOREIGN_DAYS + 0.1), (mine, FOREIGN_DAYS + 0.1)):
        (tmp_path / name).write_text("")
        changed_days_ago(tmp_path / name, days)
    remove_stale_temporaries(tmp_path)
    assert names(tmp_path) == [young]


def test_a_folder_of_another_host_is_as_old_as_the_last_change_below_it(tmp_path: Path, dead: int) -> None:
    for name, days in (("busy", 1), ("left", FOREIGN_DAYS + 1)):
        folder = tmp_path / f".{name}.{ELSEWHERE}.{dead}.tmp"
        (folder / "deep").mkdir(parents=True)
        (folder / "deep" / "shard").write_text("")
        changed_days_ago(folder / "deep" / "shard", days)
        changed_days_ago(folder / "deep", FOREIGN_DAYS + 1)
        changed_days_ago(folder, FOREIGN_DAYS + 1)
    remove_stale_temporaries(tmp_path)
    assert names(tmp_path) == [f".busy.{ELSEWHERE}.{dead}.tmp"]


def test_a_temporary_from_the_future_stays(tmp_path: Path, dead: int) -> None:
    path = tmp_path / f".x.{ELSEWHERE}.{dead}.tmp"
    path.write_text("")
    changed_days_ago(path, -30)  # the clocks of hosts differ
    remove_stale_temporaries(tmp_path)
    assert path.exists()


def test_who_alone_writes_to_a_folder_sweeps_what_any_host_left(tmp_path: Path, dead: int) -> None:
    (tmp_path / f".x.{ELSEWHERE}.{os.getpid()}.tmp").write_text("")
    (tmp_path / f".x.{pid_space()}.{dead}.tmp").write_text("")
    mine = temporary_sibling(tmp_path / "x")
    mine.write_text("")
    remove_stale_temporaries(tmp_path, exclusive=True)
    assert names(tmp_path) == [mine.name]


def test_a_process_of_another_user_is_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(process: int, signal: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    (tmp_path / f".x.{pid_space()}.1.tmp").write_text("")
    remove_stale_temporaries(tmp_path)
    assert names(tmp_path) == [f".x.{pid_space()}.1.tmp"]


def test_a_number_that_no_process_can_have_is_of_none(tmp_path: Path) -> None:
    (tmp_path / f".x.{pid_space()}.{'9' * 30}.tmp").write_text("")
    remove_stale_temporaries(tmp_path)
    assert names(tmp_path) == []


def test_a_new_folder_sweeps_beside_it(tmp_path: Path, dead: int) -> None:
    (tmp_path / f".out.{pid_space()}.{dead}.tmp").mkdir()
    with atomic_folder(tmp_path / "out"):
        pass
    assert names(tmp_path) == ["out"]


def test_without_a_boot_id_a_host_is_told_by_its_name_and_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_boot = pid_space()
    monkeypatch.setattr(processes, "_BOOT_ID", tmp_path / "none")
    pid_space.cache_clear()
    try:
        by_name = pid_space()
    finally:
        pid_space.cache_clear()
    assert by_name != by_boot
    assert re.fullmatch("h[0-9a-f]{12}", by_name)


WRITER = """
import os, sys
from pathlib import Path
from camera.files import atomic_folder
with atomic_folder(Path(sys.argv[1])) as folder:
    (folder / "shard").write_text("whole")
    print(folder.name, flush=True)
    sys.stdin.read()
"""
APART = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc")
"""Processes with numbers of their own, as on another host."""


@pytest.fixture
def apart(dead: int) -> list[str]:
    """How to start a process that has, in its own numbering, a number that is dead here."""
    script = f'echo {dead - 1} > /proc/sys/kernel/ns_last_pid; "$@"; exit $?'
    command = [*APART, "sh", "-c", script, "sh"]
    if shutil.which("unshare") is not None:
        tried = subprocess.run([*command, "sh", "-c", "echo $$"], capture_output=True, text=True)
        if tried.stdout.strip() == str(dead):
            return command
    pytest.skip("no process can be given a number of its own here")


def test_a_writer_whose_number_is_dead_here_is_not_swept(apart: list[str], dead: int, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [*apart, sys.executable, "-c", WRITER, str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as there:
        assert there.stdout is not None
        name = there.stdout.readline().strip()
        assert name.endswith(f".{dead}.tmp")
        with atomic_folder(tmp_path / "another"):  # sweeps beside it
            assert (tmp_path / name).is_dir()
        assert (tmp_path / name).is_dir()
        there.communicate("")
    assert there.returncode == 0
    assert (out / "shard").read_text() == "whole"
