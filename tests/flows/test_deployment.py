"""The deployments of prefect.yaml, for real: a server on loopback, a process pool, a worker, a run."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.flows.conftest import Workplace

REPOSITORY = Path(__file__).parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def environment(workplace: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a Prefect server that runs while the test does."""
    port = free_port()
    home = tmp_path_factory.mktemp("prefect")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "CAMERA_"))}
    variables = {
        **kept,
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "true",
        "PYTHONPATH": str(REPOSITORY),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    with (home / "server.log").open("w") as log:
        server = subprocess.Popen(
            [*PREFECT, "server", "start", "--host", "127.0.0.1", "--port", str(port)],
            env=variables, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        wait_until(lambda: answers(port), 120, "the server does not answer")
        yield variables
    finally:
        server.terminate()
        server.wait(timeout=30)


PREFECT = [sys.executable, "-m", "prefect"]


def test_a_deployed_run_is_carried_out_by_a_worker(workplace: Workplace, environment: dict[str, str]):
    shutil.copytree(
        REPOSITORY / "flows", workplace.folder / "flows", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copytree(REPOSITORY / "recipes", workplace.folder / "recipes")
    shutil.copy(REPOSITORY / "prefect.yaml", workplace.folder)

    def prefect(*arguments: str) -> str:
        done = subprocess.run(
            [*PREFECT, "--no-prompt", *arguments],
            cwd=workplace.folder, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    prefect("work-pool", "create", "camera", "--type", "process")
    prefect("deploy", "--all")
    listed = prefect("deployment", "ls")
    assert "compress/nightly" in listed
    assert "compress/manual" in listed
    worker = subprocess.Popen(
        [*PREFECT, "worker", "start", "--pool", "camera"], cwd=workplace.folder, env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        started = prefect(
            *("deployment", "run", "compress/manual", "--watch", "--watch-interval", "2"),
            *("--param", "recipe=recipe.yaml"),
        )
        assert "finished successfully" in started.lower() or "completed" in started.lower(), started
    finally:
        worker.terminate()
        worker.wait(timeout=60)
    assert (workplace.folder / "published" / "tiny" / "lineage.json").is_file()
    again = workplace.camera("run", "recipe.yaml", "--no-prefect")
    assert "running" not in again.stdout, "what a worker made, the command line finds"


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_until(holds: Callable[[], bool], seconds: float, message: str) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, message
        time.sleep(0.5)
