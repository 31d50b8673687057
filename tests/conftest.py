"""What every test may use: the shared real data, and one thread of torch per test process."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ |= dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"), "1")
os.environ |= dict.fromkeys(("DO_NOT_TRACK", "MLFLOW_DISABLE_TELEMETRY", "DVC_NO_ANALYTICS"), "true")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Where a test may run the command line, the process that it is forked from has the libraries."""
    if not session.config.option.collectonly and any(
        item.path.parent.name in ("flows", "faults") for item in session.items
    ):
        from tests.forked import start_server  # imports what the server does

        start_server()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real texts, tasks and a real trained model; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("CAMERA_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("shared data not found: set CAMERA_SHARED_DATA")
    return folder
