"""What every test may use: the shared real data, and one thread of torch per test process."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real texts, tasks and a real trained model; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("CAMERA_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("shared data not found: set CAMERA_SHARED_DATA")
    return folder
