"""The standard streams of a command: closed, given up by their reader, or in an encoding that knows few signs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

SAYS = """\
import sys
from pathlib import Path
from camera.cli.output import note, print_table, say
from camera.cli.streams import lasting
lasting()
out = open("made", "w")
for line in range(20000):
    say(f"✓ line {line} of é–→")
    sys.stdout.flush()
note("✗ …")
print_table(("name", "✓"), [("a", "b")])
sys.stdin.read()
out.write("done")
"""


def run(
    folder: Path, redirected: str, code: str = SAYS, **environment: str
) -> subprocess.CompletedProcess[bytes]:
    (folder / "says.py").write_text(code, encoding="utf-8")
    given = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPOSITORY), **environment}
    command = ["bash", "-c", f'"$0" says.py {redirected}', sys.executable]
    return subprocess.run(command, cwd=folder, env=given, capture_output=True, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize("buffered", ["", "1"])
@pytest.mark.parametrize(
    "redirected",
    [
        ">&-",
        "2>&-",
        "<&-",
        "<&- >&- 2>&-",
        "| head -1; exit ${PIPESTATUS[0]}",
        "2>&1 | true; exit ${PIPESTATUS[0]}",
    ],
)
def test_work_is_done_and_its_files_hold_no_output_whoever_reads_it(
    tmp_path: Path, redirected: str, buffered: str
):
    done = run(tmp_path, redirected, PYTHONUNBUFFERED=buffered)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "made").read_text() == "done"
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_signs_that_an_encoding_lacks_are_spelt_and_none_becomes_a_verdict_of_the_audit(
    tmp_path: Path, encoding: str
):
    few = SAYS.replace("20000", "1")
    done = run(tmp_path, "", few, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    said = done.stdout.decode(encoding)
    assert ("✓" if encoding == "utf-8" else "[ok]") + " line 0 of" in said
    assert "?" not in said + done.stderr.decode(encoding)
    assert ("\\xe9" if encoding == "ascii" else "é") in said


def test_a_full_disk_is_told_for_an_answer_that_is_cut_short_is_no_answer(tmp_path: Path):
    command = "from camera.cli import main; import sys; sys.argv = ['camera', '--help']; main()"
    done = run(tmp_path, "> /dev/full", command)
    assert done.returncode == 2
    assert b"No space left on device" in done.stderr


def test_an_answer_that_a_failing_disk_does_not_take_is_told(tmp_path: Path):
    command = """
import os, sys
from camera.cli import main
os.dup2(os.open("/proc/self/mem", os.O_WRONLY), 1)  # a regular file, whose first byte cannot be written
sys.argv = ["camera", "--help"]
main()
"""
    done = run(tmp_path, "", command)
    assert done.returncode == 2
    assert b"Input/output error" in done.stderr


def test_work_goes_on_when_its_terminal_hangs_up(tmp_path: Path):
    host, terminal = os.openpty()
    (tmp_path / "says.py").write_text("input()\n" + SAYS.replace("sys.stdin.read()", ""), encoding="utf-8")
    with subprocess.Popen(
        [sys.executable, "says.py"],
        cwd=tmp_path, env={"PYTHONPATH": str(REPOSITORY)}, stdin=subprocess.PIPE, stdout=terminal, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        os.close(terminal)
        os.close(host)
        _, errors = process.communicate(b"\n", timeout=60)
    assert process.returncode == 0, errors
    assert (tmp_path / "made").read_text() == "done"
