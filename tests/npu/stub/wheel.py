"""The wheel of torch_npu, unpacked into a folder and never installed: transformers imports it where it is installed.

python -m tests.npu.stub.wheel 2.13.0
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from zipfile import ZipFile

REPOSITORY = Path(__file__).parents[3]
VERSION = os.environ.get("NPU_WHEEL", "2.13.0")
CACHE = Path(os.environ.get("NPU_CACHE", REPOSITORY / "build" / "npu"))


def unpacked(version: str = VERSION) -> Path:
    """Where the unpacked wheel of a version lies, or would lie."""
    return CACHE / f"torch_npu-{version}-cp{sys.version_info.major}{sys.version_info.minor}"


def fetch(version: str = VERSION) -> Path:
    """Download the wheel for this Python and unpack it, unless that was done before.

    Raises:
        subprocess.CalledProcessError: if pip finds no such wheel.
    """
    folder = unpacked(version)
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as working:
            pip = (sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "-q", "--no-deps")
            subprocess.run([*pip, "-d", working, f"torch-npu=={version}"], check=True)
            with ZipFile(next(Path(working).glob("*.whl"))) as wheel:
                wheel.extractall(Path(working) / "wheel")
            (Path(working) / "wheel").rename(folder)
    return folder


if __name__ == "__main__":
    fetch(*sys.argv[1:])
