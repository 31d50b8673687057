"""llama.cpp's source, with its converter: from the package on the index that carries it.

    python -m tests.parity.llama_cpp [REQUIREMENT]

downloads the package and unpacks it into build/parity; $LLAMA_CPP names another source.
"""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "build" / "parity"
REQUIREMENT = "llama-cpp-python"


def source() -> Path | None:
    """The folder that holds convert_hf_to_gguf.py; None if none was fetched."""
    if given := os.environ.get("LLAMA_CPP"):
        return Path(given)
    found = sorted(
        FOLDER.glob("*/vendor/llama.cpp/convert_hf_to_gguf.py"), key=lambda path: path.stat().st_mtime
    )
    return found[-1].parent if found else None


def fetch(requirement: str = REQUIREMENT) -> Path:
    """Download a release, the newest unless the requirement says otherwise, and unpack what is needed of it."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "-q", "--no-deps"]
    subprocess.run([*command, "--no-binary", REQUIREMENT, "-d", str(FOLDER), requirement], check=True)
    archive = max(FOLDER.glob("llama_cpp_python-*.tar.gz"), key=lambda path: path.stat().st_mtime)
    parts = ("/conversion/", "/gguf-py/gguf/", "/convert_hf_to_gguf.py")
    with tarfile.open(archive) as tar:
        wanted = [
            member
            for member in tar
            if "/vendor/llama.cpp/" in member.name and any(part in member.name for part in parts)
        ]
        tar.extractall(FOLDER, members=wanted, filter="data")
        return FOLDER / wanted[0].name.partition("/")[0] / "vendor" / "llama.cpp"


if __name__ == "__main__":
    print(fetch(*sys.argv[1:2]))  # noqa: T201
