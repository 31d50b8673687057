"""Servers that are away, end in the middle, or never answer: MLflow, Prefect, the DVC remote, the hub."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from camera.files import read_json
from tasks.stages import publish
from tests.conftest import REPOSITORY
from tests.faults.conftest import Project, lay_out
from tests.faults.test_kill import before

pytestmark = pytest.mark.faults

NOBODY = "http://127.0.0.1:9"
TRACKED = ("tracking.enabled=true", "tracking.experiment=faults")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(**more: str) -> dict[str, str]:
    ours = ("PREFECT_", "MLFLOW_", "CAMERA_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    root = {
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "160",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    return {**kept, **root, **more}


def camera(project: Project, *arguments: str, **more: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "camera", *arguments],
        cwd=project.folder,
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=300,
    )


@contextmanager
def mlflow_server(folder: Path, port: int, *options: str) -> Iterator["subprocess.Popen[bytes]"]:
    """MLflow's own server on loopback; ended with all its workers."""
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder / 'mlflow.db'}",
        "--artifacts-destination",
        str(folder / "files"),
        *options,
    ]
    server = subprocess.Popen(
        command,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        until = time.monotonic() + 180
        while not answers(port):
            assert server.poll() is None
            assert time.monotonic() < until, "the server does not answer"
            time.sleep(0.2)
        yield server
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_mlflow_that_is_away_at_the_start_stops_nothing_and_is_told_by_the_next_run(
    undisturbed: Project, tmp_path: Path
) -> None:
    project = before(undisturbed, "evaluate original held-out", tmp_path / "project")
    port = free_port()
    run = ["run", "recipe.yaml", "--no-prefect", *(f"--set={override}" for override in TRACKED)]
    uri = f"http://someone:a-password@127.0.0.1:{port}"
    done = camera(project, *run, MLFLOW_TRACKING_URI=uri)
    assert done.returncode == 0, done.stderr
    assert f"MLflow at http://***@127.0.0.1:{port} cannot be used: [Errno 111]" in done.stderr
    assert "Tracking is pending, and the run goes on" in done.stderr
    assert "run the recipe again to deliver it" in done.stderr
    assert "tiny is published and not registered; run the recipe again" in done.stderr
    assert "mlflow run:  pending" in done.stdout
    assert "a-password" not in done.stdout + done.stderr
    assert publish.damage(project.published) is None
    lineage = read_json(project.published / "lineage.json")
    assert "mlflow_run" not in lineage["references"]

    with mlflow_server(tmp_path, port):
        again = camera(project, *run, MLFLOW_TRACKING_URI=uri)
        assert again.returncode == 0, again.stderr
        assert [line for line in again.stdout.splitlines() if line.startswith("done")] == [
            line for line in again.stdout.splitlines() if line.startswith("done     publish")
        ]
        assert "pending" not in again.stdout + again.stderr
        run_id = is_whole(port, project)
        audited = camera(project, "audit", "published/tiny", MLFLOW_TRACKING_URI=uri)
        assert audited.returncode == 0, audited.stdout
        assert f"✓ MLflow run  {run_id}" in audited.stdout
        assert "✓ MLflow registry  version 1" in audited.stdout
    assert read_json(project.published / "lineage.json") == lineage


@contextmanager
def stopped_at_work(project: Project, uri: str, said: Path) -> Iterator["subprocess.Popen[str]"]:
    """A tracked run that stands still in the first step that the store lacks; to be told SIGCONT."""
    command = [sys.executable, "-m", "camera", "run", "recipe.yaml", "--no-prefect"]
    process = subprocess.Popen(
        [*command, *(f"--set={override}" for override in TRACKED)],
        cwd=project.folder,
        env=environment(MLFLOW_TRACKING_URI=uri),
        stdout=subprocess.PIPE,
        stderr=said.open("w"),
        text=True,
    )
    try:
        assert process.stdout is not None
        assert any(line.startswith("running") for line in process.stdout), said.read_text()
        process.send_signal(signal.SIGSTOP)
        yield process
    finally:
        process.kill()
        process.wait()


def test_mlflow_that_comes_late_is_told_by_the_run_at_work(undisturbed: Project, tmp_path: Path) -> None:
    project = before(undisturbed, "evaluate original held-out", tmp_path / "project")
    port, said = free_port(), tmp_path / "said.txt"
    with stopped_at_work(project, f"http://127.0.0.1:{port}", said) as run, mlflow_server(tmp_path, port):
        run.send_signal(signal.SIGCONT)
        run.communicate(timeout=180)
        assert run.returncode == 0, said.read_text()
        assert "Tracking is pending, and the run goes on" in said.read_text()
        assert "MLflow answers again, and has all that was recorded meanwhile" in said.read_text()
        is_whole(port, project)


def test_mlflow_that_falls_silent_in_the_middle_costs_a_run_seconds(
    undisturbed: Project, tmp_path: Path
) -> None:
    project = before(undisturbed, "report", tmp_path / "project")
    port, said = free_port(), tmp_path / "said.txt"
    uri = f"http://127.0.0.1:{port}"
    with mlflow_server(tmp_path, port) as server, stopped_at_work(project, uri, said) as run:
        os.killpg(server.pid, signal.SIGSTOP)  # the kernel goes on taking connections for it
        started = time.monotonic()
        run.send_signal(signal.SIGCONT)
        run.communicate(timeout=180)
        assert run.returncode == 0, said.read_text()
        assert time.monotonic() - started < 40
        assert "no answer within 5 s" in said.read_text()
        assert publish.damage(project.published) is None

        os.killpg(server.pid, signal.SIGCONT)
        assert project.run(environment={"MLFLOW_TRACKING_URI": uri}, overrides=TRACKED) == 0, project.output()
        is_whole(port, project)


def test_mlflow_that_refuses_at_the_start_is_said_at_once(project: Project, tmp_path: Path) -> None:
    port = free_port()
    with mlflow_server(tmp_path, port, "--allowed-hosts", "mlflow.example.org"):
        refused = camera(
            project, "run", "recipe.yaml", "--no-prefect", f"--set={TRACKED[0]}",
            MLFLOW_TRACKING_URI=f"http://127.0.0.1:{port}",
        )  # fmt: skip
    assert refused.returncode == 2, refused.stderr
    assert f"MLflow at http://127.0.0.1:{port} cannot be used" in refused.stderr
    assert "403" in refused.stderr
    assert "--set tracking.enabled=false" in refused.stderr
    assert "running" not in refused.stdout


@pytest.mark.parametrize("kind", ["hangs", "resets"])
def test_mlflow_that_never_answers_at_the_start_costs_a_run_seconds(
    undisturbed: Project, tmp_path: Path, kind: str
) -> None:
    project = before(undisturbed, "report", tmp_path / "project")
    started = time.monotonic()
    assert project.run() == 0, project.output()
    untracked = time.monotonic() - started
    shutil.rmtree(project.folder)

    project = before(undisturbed, "report", tmp_path / "project")
    with silent_server(kind) as uri:
        started = time.monotonic()
        how = {"environment": {"MLFLOW_TRACKING_URI": uri}, "overrides": TRACKED}
        assert project.run(**how) == 0, project.output()
        took = time.monotonic() - started
    assert took - untracked < 30  # of which importing MLflow takes some
    assert f"MLflow at {uri} cannot be used" in project.output()
    assert publish.damage(project.published) is None
    record = read_json(next(project.store.root.glob("publish/*/published.json")))
    assert record["registry"] is None
    assert "cannot be used" in record["registry_error"]


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("http://127.0.0.1:99999", "Port out of range"),
        ("http://", "names no host"),
        ("carrier-pigeon://roof", "carrier-pigeon"),
    ],
)
def test_a_tracking_address_that_is_wrong_at_the_start_is_refused(
    project: Project, uri: str, reason: str
) -> None:
    stopped = camera(
        project, "run", "recipe.yaml", "--no-prefect", "--set", TRACKED[0], MLFLOW_TRACKING_URI=uri
    )
    assert stopped.returncode == 2, stopped.stderr
    assert f"MLflow at {uri} cannot be used" in stopped.stderr
    assert reason in stopped.stderr
    assert "--set tracking.enabled=false" in stopped.stderr
    assert "running" not in stopped.stdout


def test_mlflow_that_ends_in_the_middle_stops_nothing_and_is_told_later(
    undisturbed: Project, tmp_path: Path
) -> None:
    project = before(undisturbed, "evaluate original held-out", tmp_path / "project")
    port = free_port()
    how = {"environment": {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"}, "overrides": TRACKED}
    with mlflow_server(tmp_path, port) as server:
        assert project.run(**how, kill_group=server.pid, step="evaluate original held-out") == 0, (
            project.output()
        )
    record = read_json(next(project.store.root.glob("publish/*/published.json")))
    assert record["registry"] is None
    assert "cannot be used" in record["registry_error"]
    assert publish.damage(project.published) is None

    with mlflow_server(tmp_path, port):
        assert project.run(**how) == 0, project.output()
        states = project.told["states"]
        assert [step for step, state in states.items() if state == "done"] == ["publish"]
        run_of = recorded(port)
    assert run_of["status"] == "FINISHED"
    assert {"evaluate/pruned/held-out/perplexity", "publish/bytes"} <= run_of["metrics"].keys()
    record = read_json(next(project.store.root.glob("publish/*/published.json")))
    assert record["registry"]["version"] == "1"


def is_whole(port: int, project: Project) -> str:
    """That a server has the whole run, and the registry the publication with its alias; the run's id."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"http://127.0.0.1:{port}")
    experiment = client.get_experiment_by_name("faults")
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["prune.ratio"] == "0.4"
    assert {
        "evaluate/pruned/held-out/perplexity",
        "prune/seconds",
        "publish/bytes",
    } <= run.data.metrics.keys()
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert files == {"report.html", "results.json", "README.md", "lineage.json"}
    assert len(run.inputs.dataset_inputs) == 2
    record = read_json(next(project.store.root.glob("publish/*/published.json")))
    assert (record["registry"]["version"], record["registry_error"]) == ("1", None)
    version = client.get_model_version_by_alias("tiny", record["registry"]["alias"])
    assert version.run_id == run.info.run_id
    assert version.tags["camera.lineage_digest"] == record["lineage_digest"]
    return str(run.info.run_id)


def recorded(port: int) -> dict[str, Any]:
    """Status and metrics of the one run that a server has."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"http://127.0.0.1:{port}")
    experiment = client.get_experiment_by_name("faults")
    [run] = client.search_runs([experiment.experiment_id])
    return {"status": run.info.status, "metrics": run.data.metrics}


def test_a_prefect_api_that_is_away_is_said_and_the_plain_loop_named(project: Project) -> None:
    started = time.monotonic()
    stopped = camera(project, "run", "recipe.yaml", PREFECT_API_URL=f"{NOBODY}/api")
    assert stopped.returncode == 2, stopped.stdout + stopped.stderr
    assert f"{NOBODY}/api" in stopped.stderr
    assert "--no-prefect" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert time.monotonic() - started < 120


def test_a_dvc_remote_that_is_away_leaves_a_push_that_the_next_run_makes_good(
    undisturbed: Project, tmp_path: Path
) -> None:
    project = before(undisturbed, "publish", tmp_path / "project")
    for command in (
        ["git", "init", "-q"],
        [sys.executable, "-m", "dvc", "init", "-q"],
        [sys.executable, "-m", "dvc", "config", "core.analytics", "false"],
        [
            sys.executable,
            "-m",
            "dvc",
            "remote",
            "add",
            "-q",
            "-d",
            "box",
            f"ssh://127.0.0.1:{free_port()}/box",
        ],
    ):
        subprocess.run(command, cwd=project.folder, env=environment(), check=True)
    dvc = ("publish.dvc=true",)
    assert project.run(overrides=dvc) == 0, project.told["error"]
    record = read_json(next(project.store.root.glob("publish/*/published.json")))
    assert record["dvc"]["pushed_to"] is None
    assert record["dvc"]["push_error"]
    assert publish.damage(project.published) is None

    box = tmp_path / "box"
    box.mkdir()
    there = [sys.executable, "-m", "dvc", "remote", "modify", "box", "url", str(box)]
    subprocess.run(there, cwd=project.folder, env=environment(), check=True)
    assert project.run(overrides=dvc) == 0, project.told["error"]
    assert [step for step, state in project.told["states"].items() if state == "done"] == ["publish"]
    record = read_json(next(project.store.root.glob("publish/*/published.json")))
    assert (record["dvc"]["pushed_to"], record["dvc"]["push_error"]) == ("box", None)
    assert any(box.rglob("*.dir"))
    assert project.run(overrides=dvc) == 0
    assert set(project.told["states"].values()) == {"cached"}


@pytest.mark.parametrize("kind", ["hangs", "refuses", "resets"])
def test_a_hub_that_does_not_answer_is_a_message_and_no_hang(tmp_path: Path, model: Path, kind: str) -> None:
    project = lay_out(tmp_path / "project", model)
    with silent_server(kind) as url:
        started = time.monotonic()
        stopped = camera(
            project, "run", "recipe.yaml", "--no-prefect", "--set", "model=some/model",
            HF_ENDPOINT=url, HF_HUB_OFFLINE="0", HF_HUB_ETAG_TIMEOUT="2", HF_HUB_DOWNLOAD_TIMEOUT="2",
            HF_HOME=str(tmp_path / "hub"),
        )  # fmt: skip
    assert stopped.returncode == 2, stopped.stderr
    assert "some/model is no folder here and the hub did not give it" in stopped.stderr
    assert "Download it where there is a network" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert time.monotonic() - started < 180


@contextmanager
def silent_server(kind: str) -> Iterator[str]:
    """A server on loopback that takes connections and answers none, or ends them, or is not there."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        taken: list[socket.socket] = []

        def serve() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                if kind == "resets":
                    connection.close()
                else:
                    taken.append(connection)

        if kind != "refuses":
            listening.listen()
            threading.Thread(target=serve, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            for connection in taken:
                connection.close()


@pytest.mark.parametrize("prefect", [False, True], ids=["loop", "prefect"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_run_that_is_told_to_stop_ends_with_130_and_goes_on_later(
    undisturbed: Project, tmp_path: Path, prefect: bool, number: int
) -> None:
    project = before(undisturbed, "quantize", tmp_path / "project")
    how = ["run", "recipe.yaml"] + ([] if prefect else ["--no-prefect"])
    process = subprocess.Popen(
        [sys.executable, "-m", "camera", *how],
        cwd=project.folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith("running"):
            process.send_signal(number)
            break
    said.append(process.stdout.read())
    assert process.wait(timeout=120) == 130, "".join(said)
    assert "run the same command again to go on from here" in said[-1]
    assert (
        prefect or "Traceback" not in said[-1]
    )  # Prefect's own server may complain of the client that is gone
    assert project.run() == 0, project.told["error"]
    assert [state for step, state in project.told["states"].items() if step in ("prune", "save")] == [
        "cached"
    ] * 2
    shutil.rmtree(project.folder)
