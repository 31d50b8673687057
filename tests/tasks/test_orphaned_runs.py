"""MLflow runs whose process was killed do not stay RUNNING."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from camera.processes import process_identity
from tasks.tracking import PROCESS_TAG, Tracker, close_orphaned_runs

OPEN_A_RUN_AND_DIE = """
import os, signal, sys
from pathlib import Path
from tasks.tracking import Tracker
print(Tracker("tests", sys.argv[1], "tiny", Path("artifacts").resolve()).run_id, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(autouse=True)
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.chdir(tmp_path)


def killed(key: str) -> str:
    """Id of a run that a process opened and left by being killed."""
    done = subprocess.run([sys.executable, "-c", OPEN_A_RUN_AND_DIE, key], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_the_next_run_closes_what_killed_ones_left_and_continues_its_own(tmp_path: Path):
    another, same = killed("another recipe"), killed("this recipe")
    tracker = Tracker("tests", "this recipe", "tiny", tmp_path / "artifacts")
    client = tracker._client
    assert tracker.run_id == same
    assert client.get_run(another).info.status == "KILLED"
    assert client.get_run(same).info.status == "RUNNING"
    tracker.finish("FINISHED")
    assert client.get_run(same).info.status == "FINISHED"


def test_runs_of_living_processes_and_of_other_hosts_are_left_alone(tmp_path: Path):
    tracker = Tracker("tests", "this recipe", "tiny", tmp_path / "artifacts")
    client = tracker._client
    assert client.get_run(tracker.run_id).data.tags[PROCESS_TAG] == process_identity()
    elsewhere = client.create_run(tracker.experiment_id, tags={PROCESS_TAG: "another-host 1 1.5"})
    untagged = client.create_run(tracker.experiment_id)
    assert close_orphaned_runs(client, tracker.experiment_id) == []
    for run in (tracker.run_id, elsewhere.info.run_id, untagged.info.run_id):
        assert client.get_run(run).info.status == "RUNNING"
