"""How the command line ends when an NPU fails: the cause and what to do, below what was raised."""

import subprocess
import sys
from pathlib import Path

from camera.ascend.causes import SOURCE_CANN
from tests.conftest import REPOSITORY


def ends_with(folder: Path, error: str) -> tuple[int, list[str]]:
    """The exit code, and the lines on the error stream, of a command that raises this."""
    script = folder / "fails.py"
    script.write_text(
        "import sys\n"
        "import camera.doctor\n"
        "from camera.cli import main\n"
        "from camera.errors import CameraError\n"
        "def fails():\n"
        f"    raise {error}\n"
        "camera.doctor.diagnose = fails\n"
        "sys.argv[1:] = ['doctor']\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stderr.strip().splitlines()


def test_an_error_of_an_npu_is_explained_below_its_traceback(tmp_path: Path) -> None:
    code, lines = ends_with(tmp_path, "RuntimeError('NPU function error: aclrtX, error code is 507015')")
    assert lines[0].startswith("Traceback")
    assert lines[-1].startswith("camera: the device threw an exception in an operator")
    assert code == 1


def test_an_error_of_a_rank_is_one_line_with_its_cause(tmp_path: Path) -> None:
    code, lines = ends_with(
        tmp_path, "CameraError('a rank was lost: NPU out of memory. Tried to allocate 2 GiB')"
    )
    assert len(lines) == 1
    assert lines[0].startswith(
        "camera: a rank was lost: NPU out of memory. Tried to allocate 2 GiB: the card's memory is full: "
    )
    assert code == 2


def test_what_says_what_to_do_already_is_left_as_it_is(tmp_path: Path) -> None:
    message = f"torch_npu cannot be loaded: {SOURCE_CANN} (libhccl.so: cannot open shared object file)"
    assert ends_with(tmp_path, f"CameraError({message!r})") == (2, [f"camera: {message}"])
