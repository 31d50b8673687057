"""The Prefect server dies in the middle: of a run, of a job that holds a device; and what the server does when runs die."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tasks.stages import publish
from tests.faults.conftest import Project, start
from tests.faults.test_kill import before
from tests.faults.test_networks import answers, environment, free_port

pytestmark = pytest.mark.faults

LEASE_SECONDS = 60
"""The least that the server takes."""
SILENCE_SECONDS, START_SECONDS = 10, 15
DEVICE = "camera-here-npu-0"
IMPATIENT = {"PREFECT_CLIENT_MAX_RETRIES": "0"}
"""For a server that does not come back: Prefect's client is not to try again for long."""
FLOW = """\
import os, time
from pathlib import Path
from prefect import flow

@flow
def work(what: str) -> None:
    if what == "fail":
        raise ValueError("the disk is on fire")
    Path(what).write_text(str(os.getpid()))
    time.sleep(300)
"""


class Server:
    """Prefect's own server on loopback, with a folder of its own; it may be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}/api"
        self.settings = {
            "DO_NOT_TRACK": "true",
            "PREFECT_HOME": str(folder / "prefect"),
            "PREFECT_API_URL": self.address,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_LOGGING_LEVEL": "WARNING",
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        lasting = "prefect.server.concurrency.lease_storage.filesystem"
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "prefect",
                "server",
                "start",
                "--host",
                "127.0.0.1",
                "--port",
                str(self.port),
            ],
            env=environment(**self.settings, PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE=lasting),
            stdout=(self.folder / "server.log").open("ab"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        wait_for(lambda: answers(self.port), 180, "the server does not answer")
        assert self._process.poll() is None

    def kill(self) -> None:
        assert self._process is not None
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def ask(self, path: str, **content: Any) -> Any:
        """Post, or get if there is nothing to say."""
        method = "POST" if content else "GET"
        answer = httpx.request(method, self.address + path, json=content or None, timeout=60)
        return answer.raise_for_status().json()

    def state(self, run: str) -> dict[str, Any]:
        return dict(self.ask(f"/flow_runs/{run}")["state"])

    def lease(self) -> tuple[str, datetime]:
        """The id of the one lease of the device that there is, and when it ends."""
        limit = self.ask(f"/v2/concurrency_limits/{DEVICE}")["id"]
        files = (self.folder / "prefect" / "concurrency_leases").glob("*-*.json")
        leases = [json.loads(file.read_text()) for file in files]  # also of runs that other tests ended
        [lease] = [lease for lease in leases if limit in lease["resource_ids"]]
        return lease["id"], datetime.fromisoformat(lease["expiration"])


def wait_for(holds: Callable[[], Any], seconds: float, otherwise: str) -> Any:
    until = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < until, otherwise
        time.sleep(0.2)
    return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that every test leaves running."""
    served = Server(tmp_path_factory.mktemp("server"))
    served.start()
    yield served
    served.kill()


def run_and_kill(
    project: Project, step: str, kill: Callable[[int], None], **settings: str
) -> tuple[int, str]:
    """`camera run`, and something that is killed as a step begins, given the run's pid; exit code and output."""
    process = subprocess.Popen(
        [sys.executable, "-m", "camera", "run", "recipe.yaml"],
        cwd=project.folder,
        env=environment(**settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith(f"running  {step}"):
            kill(process.pid)
    return process.wait(), "".join(said)


def test_a_server_that_is_killed_in_the_middle_costs_its_record_and_not_the_run(
    server: Server, undisturbed: Project, tmp_path: Path
) -> None:
    project = before(undisturbed, "benchmark", tmp_path / "project")
    try:
        code, said = run_and_kill(
            project, "benchmark", lambda _: server.kill(), PREFECT_API_URL=server.address, **IMPATIENT
        )
    finally:
        server.kill()
        server.start()
    assert code == 0, said
    assert f"{server.address} stopped answering" in said
    assert "does not know that this run ended; all is done" in said
    assert "Traceback" not in said
    assert publish.damage(project.published) is None
    finished = project.whole()
    again = subprocess.run(
        [sys.executable, "-m", "camera", "run", "recipe.yaml", "--json"],
        cwd=project.folder,
        env=environment(PREFECT_API_URL=server.address),
        capture_output=True,
        text=True,
    )
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["executed"] == []
    assert project.whole() == finished


def test_an_api_in_the_process_that_is_killed_costs_nothing(undisturbed: Project, tmp_path: Path) -> None:
    project = before(undisturbed, "benchmark", tmp_path / "project")
    killed = []

    def kill(run: int) -> None:
        for child in psutil.Process(run).children(recursive=True):
            if "uvicorn" in " ".join(child.cmdline()):
                child.kill()
                killed.append(child.pid)

    code, said = run_and_kill(project, "benchmark", kill, **IMPATIENT)
    assert killed
    assert code == 0, said
    assert "all is done" in said
    assert "Traceback" not in said
    assert publish.damage(project.published) is None
    assert project.run() == 0, project.told["error"]
    assert {project.told["states"][step] for step in ("capture", "prune", "benchmark")} == {"cached"}


def hold(settings: dict[str, str], place: Path) -> None:
    """Hold the device until killed; `place` exists from then on, and the log lies beside it."""
    os.environ.update(settings)
    logging.basicConfig(filename=f"{place}.log", level=logging.INFO)
    from flows.device_limits import slots_of

    with slots_of([DEVICE], place.name, LEASE_SECONDS):
        place.touch()
        time.sleep(600)


def test_a_job_keeps_its_device_while_the_server_is_killed_and_loses_it_when_it_is(
    server: Server, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    holders = [start(hold, server.settings, first)]
    try:
        wait_for(first.exists, 120, "the device is not free")
        server.kill()
        server.start()
        holders.append(start(hold, server.settings, second))
        _, known = server.lease()
        wait_for(lambda: server.lease()[1] > known, 60, "the lease is not renewed after the restart")
        assert server.ask(f"/v2/concurrency_limits/{DEVICE}")["active_slots"] == 1
        wait_for(lambda: "waiting for" in Path(f"{second}.log").read_text(), 60, "the second does not try")
        time.sleep(12)  # two of its tries
        assert not second.exists(), "one job per device"

        holders[0].kill()
        killed = time.monotonic()
        wait_for(second.exists, LEASE_SECONDS + 45, "the slot of a killed job does not come free")
        assert time.monotonic() - killed > 15, "the lease was in force"
        _, known_to_second = server.lease()
        assert known_to_second > known
    finally:
        for holder in holders:
            holder.kill()
            holder.join()


def test_a_job_whose_slot_the_server_gave_away_says_so_and_takes_it_again(
    server: Server, tmp_path: Path
) -> None:
    device = tmp_path / "job"
    holder = start(hold, server.settings, device)
    try:
        wait_for(device.exists, 180, "the device is not free")
        lease, _ = server.lease()
        httpx.post(
            f"{server.address}/v2/concurrency_limits/decrement-with-lease", json={"lease_id": lease}
        ).raise_for_status()
        log = Path(f"{device}.log")
        wait_for(lambda: "held again" in log.read_text(), 60, "the job did not notice")
        assert "the server has given it away" in log.read_text()
        assert server.ask(f"/v2/concurrency_limits/{DEVICE}")["active_slots"] == 1
    finally:
        holder.kill()
        holder.join()


@contextmanager
def receiver() -> Iterator[tuple[str, list[dict[str, str]]]]:
    """An address that takes notifications, and those that came."""
    came: list[dict[str, str]] = []

    class Take(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            came.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *arguments: Any) -> None: ...

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Take)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{listening.server_port}/hook", came
    listening.shutdown()


def deploy(settings: dict[str, str], folder: Path, webhook: str) -> None:
    """Automations with short thresholds, and a deployment that nobody polls; its id goes into `deployment`."""
    os.environ.update(settings)
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.workers.process import ProcessWorker

    from flows.automations import apply_automations

    apply_automations(webhook, SILENCE_SECONDS, START_SECONDS)
    with get_client(sync_client=True) as client:
        template = ProcessWorker.get_default_base_job_template()
        client.create_work_pool(WorkPoolCreate(name="nobody", type="process", base_job_template=template))
        deployment = client.create_deployment(
            client.create_flow_from_name("work"),
            "work",
            work_pool_name="nobody",
            path=str(folder),
            entrypoint="work.py:work",
        )
    (folder / "deployment").write_text(str(deployment))


def test_the_server_closes_dead_runs_and_tells_of_failed_crashed_and_late_ones(
    server: Server, tmp_path: Path
) -> None:
    (tmp_path / "work.py").write_text(FLOW)
    with receiver() as (webhook, came):
        deploying = start(deploy, server.settings, tmp_path, webhook)
        deploying.join(120)
        assert deploying.exitcode == 0
        deployment = (tmp_path / "deployment").read_text()

        def ask_for(what: str, **state: Any) -> str:
            more = {"state": state} if state else {}
            made = server.ask(
                f"/deployments/{deployment}/create_flow_run", name=what, parameters={"what": what}, **more
            )
            return str(made["id"])

        late = ask_for("late")  # due now, and no worker polls
        later = {"type": "SCHEDULED", "state_details": {"scheduled_time": "2100-01-01T00:00:00Z"}}
        stuck = ask_for("stuck", **later)
        # As a worker does that takes a run, and dies before it starts the process.
        server.ask(f"/flow_runs/{stuck}/set_state", state={"type": "PENDING"})
        # Taken too, by a name that no automation counts from: their processes may start slowly.
        taken = {"type": "PENDING", "name": "Taken"}
        silent, failing = ask_for("silent", **taken), ask_for("fail", **taken)
        executing = [
            subprocess.Popen(
                [sys.executable, "-m", "prefect.engine", run],  # what a worker starts
                cwd=tmp_path,
                env=environment(**server.settings, PREFECT_FLOWS_HEARTBEAT_FREQUENCY="30"),
                stdout=(tmp_path / "executing.log").open("ab"),
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            for run in (silent, failing)
        ]
        try:
            wait_for((tmp_path / "silent").exists, 120, "the run did not begin")
            time.sleep(1)  # its first heartbeat is on its way
            os.killpg(executing[0].pid, signal.SIGKILL)

            expected = {"silent": "Crashed", "stuck": "Crashed", "fail": "Failed", "late": "Late"}
            names = {silent: "silent", stuck: "stuck", failing: "fail", late: "late"}

            def told() -> dict[str, str]:
                return {names[message["run"]]: message["state"] for message in came}

            wait_for(lambda: told().keys() >= expected.keys(), 90, f"nobody was told of all: {came}")
        finally:
            for process in executing:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        assert told() == expected
        assert len(came) == len(expected), "each is told once"
        messages = {names[message["run"]]: message["text"] for message in came}
        assert f"no sign of life for {SILENCE_SECONDS} s" in messages["silent"]
        assert f"did not begin within {START_SECONDS} s" in messages["stuck"]
        assert "the disk is on fire" in messages["fail"]
        assert server.state(silent)["type"] == server.state(stuck)["type"] == "CRASHED"
        assert server.state(failing)["type"] == "FAILED"
