"""MLflow's database held by another process is waited for; one that is lost leaves a run that goes on, and says so."""

import shutil
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from camera.errors import NetworkError
from tasks import busy_database, registry
from tasks.tracking import Tracker


@pytest.fixture
def copied(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A database of one's own."""
    registry.versions()  # makes the one that is copied
    path = Path(shutil.copy(database.removeprefix("sqlite:///"), tmp_path / "mlflow.db"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
    return path


@pytest.fixture(scope="module", autouse=True)
def _made(database_file: Path) -> None:
    from tasks.mlflow_client import ready_database

    ready_database(database_file)


@contextmanager
def held(path: Path, seconds: float, begin: str = "BEGIN EXCLUSIVE") -> Iterator[None]:
    """Another connection that holds the database exclusively, from before the block until so long after it began."""
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    for statement in begin.split(";"):
        other.execute(statement).fetchall()
    ending = threading.Timer(seconds, lambda: other.execute("ROLLBACK"))
    ending.start()
    try:
        yield
    finally:
        ending.join()
        other.close()


def tracker(tmp_path: Path, key: str = "key") -> Tracker:
    return Tracker("camera", key, "tiny", tmp_path / "artifacts")


def test_a_database_that_is_busy_is_waited_for_at_the_start_and_later(
    copied: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with held(copied, 1.3):
        run = tracker(tmp_path)
    assert run.pending is None
    with held(copied, 0.7):
        run.measure({"one": 1.0})
    assert run.pending is None
    said = [record.message for record in caplog.records if record.name == "camera.tracking"]
    assert set(said) == {"waiting for another process that writes to MLflow's database"}


def test_a_reader_who_lets_write_and_not_commit_is_waited_for(copied: Path, tmp_path: Path) -> None:
    run = tracker(tmp_path)
    with held(copied, 1.6, "BEGIN; SELECT count(*) FROM tags"):
        run.measure({"one": 1.0})
    assert run.pending is None


def test_one_that_stays_busy_leaves_the_record_pending(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(busy_database, "_BUSY_SECONDS", 0.1)
    with held(copied, 3):
        run = tracker(tmp_path)
        assert "database is locked" in str(run.pending)
    run.finish("FINISHED")
    assert "MLflow lacks this run; run the recipe again to deliver it" in caplog.text
    assert "Traceback" not in caplog.text
    assert tracker(tmp_path).pending is None


def test_one_that_is_taken_away_leaves_the_record_pending_in_words(
    copied: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tracker(tmp_path)
    run.measure({"one": 1.0})
    assert run.pending is None
    copied.unlink()
    run.measure({"two": 2.0})
    assert "was taken away or replaced" in str(run.pending)
    run.finish("FINISHED")
    assert "tracking is pending: MLflow lacks 2 records of this run" in caplog.text
    assert "Traceback" not in caplog.text
    assert not copied.exists()  # nothing half is made in its place
    with pytest.raises(NetworkError, match="taken away meanwhile"):
        registry.register("tiny", tmp_path, {"digest": "x", "files": {}}, None, "candidate", str(run.run_id))
