"""How the command line ends when an NPU fails: the cause and what to do, below what was raised."""

import subprocess
import sys
from pathlib import Path

from tests.conftest import REPOSITORY


def test_an_error_of_an_npu_is_explained_below_its_traceback(tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text(
        "import sys\n"
        "import camera.doctor\n"
        "from camera.cli import main\n"
        "def fails():\n"
        "    raise RuntimeError('NPU function error: aclrtSynchronizeStream, error code is 507015')\n"
        "camera.doctor.diagnose = fails\n"
        "sys.argv[1:] = ['doctor']\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    lines = done.stderr.strip().splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1].startswith("camera: the device threw an exception in an operator")
    assert done.returncode == 1
