"""`camera serve`: a Prefect server, a worker and the MLflow UI for one machine, on loopback; or a worker of a team's.

What is up already is left alone, so the command can be given again after a crash or a reboot: it starts what is
missing, on the ports it had, and schedules again the runs that died with their process.
"""

import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import httpx

from camera.errors import CameraError
from flows.services import HOST, Service, Services, choose_port, inherited, python, wait_until
from tasks.project import Project
from tasks.tracking_database import database_of, ready_database

POOLS = ("camera", "ascend")
PREFECT_PORT, MLFLOW_PORT = 4200, 5000
START_SECONDS = 300
HEARTBEAT_SECONDS = 30
"""How often a flow run says that it lives. Much less than the silence after which the server takes it for dead."""


@dataclass
class Served:
    """What runs, and what was done."""

    prefect: str
    """Address of the Prefect UI."""
    mlflow: str
    """Address of the MLflow UI, or the tracking server in use."""
    services: list[Service]
    recovered: list[str] = field(default_factory=list)
    """Runs that were killed and are scheduled again."""
    automations: list[str] = field(default_factory=list)
    notifies: bool = False


def serve(
    project: Project,
    pools: list[str],
    prefect_port: int | None,
    mlflow_port: int | None,
    webhook: str | None,
    say: Callable[[str], None],
) -> Served:
    """Start what is missing, deploy prefect.yaml of the working directory, and wait until all is healthy.

    With PREFECT_API_URL set no server is started, and with an http MLFLOW_TRACKING_URI no MLflow UI: only workers.

    Args:
        project: where state and logs are.
        pools: the work pools that this machine's workers poll.
        prefect_port, mlflow_port: None takes the usual one, or the next that is free.
        webhook: where notifications go; None leaves that as it is.
        say: told what is being done.

    Raises:
        CameraError: if there is no prefect.yaml here, a port is in use, or something does not start.
    """
    if not Path("prefect.yaml").is_file():
        raise CameraError(
            f"there is no prefect.yaml in {Path.cwd()}: run this where your recipes and flows are"
        )
    services = Services(project.home)
    with services.alone():
        environment = inherited() | _settings()
        api = os.environ.get("PREFECT_API_URL") or _prefect(services, prefect_port, environment, say)
        environment |= {
            "PREFECT_API_URL": api,
            "PREFECT_UI_API_URL": api,
            "PREFECT_UI_URL": api.removesuffix("/api"),
        }
        os.environ.update(environment)  # before prefect is imported, which reads its settings then
        tracking = project.mlflow_uri
        ui = (
            tracking
            if tracking.startswith("http")
            else _mlflow(services, project, mlflow_port, environment, say)
        )
        served = Served(api.removesuffix("/api"), ui, [])
        _prepare(served, webhook)
        say("deploying prefect.yaml")
        _deploy(environment)
        for pool in pools:
            _worker(services, project, pool, environment, served, say)
        served.services = [service for service in services.known().values() if service.alive]
    return served


def _settings() -> dict[str, str]:
    return {
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": os.environ.get(
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE", "prefect.server.concurrency.lease_storage.filesystem"
        ),
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": os.environ.get(
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY", str(HEARTBEAT_SECONDS)
        ),
        # A worker that is told to end lets its runs go on later, instead of closing them as crashed.
        "PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR": os.environ.get(
            "PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR", "reschedule"
        ),
        "PREFECT_LOGGING_LEVEL": os.environ.get("CAMERA_LOGGING_LEVEL", "INFO"),
        "PREFECT_LOGGING_EXTRA_LOGGERS": "camera",
    }


def _prefect(
    services: Services, wanted: int | None, environment: dict[str, str], say: Callable[[str], None]
) -> str:
    known = services.known().get("prefect")
    if known is not None and known.alive and known.url is not None:
        return known.url
    port = choose_port(_again(known, wanted), PREFECT_PORT, "--prefect-port")
    api = f"http://{HOST}:{port}/api"
    own = {"PREFECT_API_URL": api, "PREFECT_UI_API_URL": api, "PREFECT_UI_URL": f"http://{HOST}:{port}"}
    say(f"starting the Prefect server on {HOST}:{port}")
    service = services.start(
        "prefect",
        python("prefect", "server", "start", "--host", HOST, "--port", str(port)),
        environment | own,
        url=api,
    )
    wait_until(lambda: _answers(f"{api}/health"), service, START_SECONDS)
    return api


def _mlflow(
    services: Services,
    project: Project,
    wanted: int | None,
    environment: dict[str, str],
    say: Callable[[str], None],
) -> str:
    known = services.known().get("mlflow")
    if known is not None and known.alive and known.url is not None:
        return known.url
    port = choose_port(_again(known, wanted), MLFLOW_PORT, "--mlflow-port")
    url = f"http://{HOST}:{port}"
    say(f"starting the MLflow UI on {HOST}:{port}")
    if (database := database_of(project.mlflow_uri)) is not None:
        ready_database(database)
    command = python("mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1")
    command += ["--backend-store-uri", project.mlflow_uri]
    command += ["--default-artifact-root", project.mlflow_artifacts.as_uri()]
    own = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # four more processes, for what nobody here uses
    service = services.start("mlflow", command, environment | own, url=url)
    wait_until(lambda: _answers(f"{url}/health"), service, START_SECONDS)
    return url


def _again(known: Service | None, wanted: int | None) -> int | None:
    """The port a service had: workers and bookmarks know it."""
    if wanted is not None or known is None or known.url is None:
        return wanted
    return httpx.URL(known.url).port


def _prepare(served: Served, webhook: str | None) -> None:
    from prefect.client.orchestration import get_client  # two seconds; only `camera serve` pays them
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists
    from prefect.workers.process import ProcessWorker

    from flows.accelerators import limit_name
    from flows.automations import apply_automations
    from flows.slots import create_limits

    with get_client(sync_client=True) as client:
        existing = {pool.name for pool in client.read_work_pools()}
        template = ProcessWorker.get_default_base_job_template()
        for name in POOLS:
            if name not in existing:
                try:
                    client.create_work_pool(
                        WorkPoolCreate(name=name, type="process", base_job_template=template)
                    )
                except ObjectAlreadyExists:
                    continue  # another host was quicker
        create_limits([limit_name(*device) for device in _devices()], client)
    served.automations = apply_automations(webhook)
    served.notifies = any("tell of" in name for name in served.automations)


def _devices() -> list[tuple[str, int]]:
    import torch  # two seconds

    from camera.devices import resolve_device

    best = resolve_device("auto")
    count = 0 if best.type == "cpu" else torch.get_device_module(best.type).device_count()
    return [("cpu", 0), *((best.type, number) for number in range(count))]


def _deploy(environment: dict[str, str]) -> None:
    done = subprocess.run(
        python("prefect", "--no-prompt", "deploy", "--all"),
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        raise CameraError(f"prefect deploy --all failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")


def _worker(
    services: Services,
    project: Project,
    pool: str,
    environment: dict[str, str],
    served: Served,
    say: Callable[[str], None],
) -> None:
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    from flows.presence import recover

    name = f"worker-{pool}"
    known = services.known().get(name)
    if known is not None and known.alive:
        return
    with get_client(sync_client=True) as client:
        try:
            client.read_work_pool(pool)
        except ObjectNotFound:
            raise CameraError(
                f"--pool {pool}: there is no such work pool; {' and '.join(POOLS)} exist"
            ) from None
    served.recovered += recover(project.home)
    say(f"starting a worker for the pool {pool}")
    began = datetime.now(UTC)
    service = services.start(name, python("prefect", "worker", "start", "--pool", pool), environment)

    def polls() -> bool:
        with get_client(sync_client=True) as client:
            workers = client.read_workers_for_work_pool(pool)
        seen = [worker.last_heartbeat_time for worker in workers]
        return any(time is not None and time >= began for time in seen)

    wait_until(polls, service, START_SECONDS)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).status_code == 200
    except httpx.HTTPError:
        return False
