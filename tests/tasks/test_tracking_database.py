"""MLflow's SQLite file is made whole, or not there."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tasks.mlflow_client import database_of, ready_database

MAKE = "import sys; from pathlib import Path; from tasks.mlflow_client import ready_database; "
MAKE += "ready_database(Path(sys.argv[1]))"


def tables(path: Path) -> int:
    database = sqlite3.connect(path)
    try:
        return int(database.execute("select count(*) from sqlite_master where type = 'table'").fetchone()[0])
    finally:
        database.close()


def test_only_an_sqlite_address_is_a_file() -> None:
    assert database_of("sqlite:////a/b.db") == Path("/a/b.db")
    assert database_of("http://127.0.0.1:5000") is None


@pytest.mark.slow
def test_a_kill_while_the_tables_are_made_leaves_no_database(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    making = subprocess.Popen([sys.executable, "-c", MAKE, str(path)], stderr=subprocess.DEVNULL)
    while not any(
        other.stat().st_size for other in tmp_path.glob(".mlflow.db.*.tmp")
    ):  # the first table is in it
        assert making.poll() is None, "it ended before it could be killed"
        time.sleep(0.001)
    os.kill(making.pid, signal.SIGKILL)
    making.wait()
    assert not path.exists()
    ready_database(path)
    assert tables(path) > 30


@pytest.mark.slow
def test_several_processes_make_one_database(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    command = [sys.executable, "-c", MAKE, str(path)]
    with ThreadPoolExecutor(2) as pool:
        codes = list(pool.map(lambda _: subprocess.run(command, check=False).returncode, range(2)))
    assert codes == [0, 0]
    assert [other.name for other in tmp_path.iterdir()] == ["mlflow.db"]


def test_a_database_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    path.write_text("no database at all, but long enough to be read as one" * 20)
    with pytest.raises(OSError, match=r"mlflow\.db: file is not a database"):
        ready_database(path)
