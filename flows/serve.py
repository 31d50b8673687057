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
from flows.guard import SECRET
from flows.secret import know_own_servers, project_secret
from flows.services import HOST, Service, Services, choose_port, inherited, python, wait_until
from tasks.mlflow_client import database_of, ready_database
from tasks.project import Project

_CHECKOUT = Path(__file__).resolve().parents[1]
POOLS = ("camera", "ascend")
PREFECT_PORT, MLFLOW_PORT = 4200, 5000
START_SECONDS = 300
HEARTBEAT_SECONDS = 30
"""How often a flow run sends a heartbeat. Much less than the silence after which the server takes it for dead."""


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
    with services.exclusive():
        environment = inherited() | _settings()
        know_own_servers(project, environment)
        server = _Starter(services, environment, project.home, say)
        api = environment.get("PREFECT_API_URL") or server.prefect(prefect_port)
        environment |= _addresses(api)
        os.environ.update(environment)  # before prefect is imported, which reads its settings then
        from flows.local_api import check_api

        check_api()
        tracking = project.mlflow_uri
        ui = tracking if tracking.startswith("http") else server.mlflow(project, mlflow_port)
        served = Served(api.removesuffix("/api"), ui, [])
        _prepare(served, webhook)
        say("deploying prefect.yaml")
        _deploy(environment)
        for pool in pools:
            served.recovered += server.worker(project, pool)
        served.services = [service for service in services.known().values() if service.alive]
    return served


def _addresses(api: str) -> dict[str, str]:
    return {
        "PREFECT_API_URL": api,
        "PREFECT_UI_API_URL": api,
        "PREFECT_UI_URL": api.removesuffix("/api"),
    }


def _settings() -> dict[str, str]:
    defaults = {
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS),
        # A worker that is asked to end lets its runs go on later, instead of closing them as crashed.
        "PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR": "reschedule",
    }
    return {
        **{name: os.environ.get(name, default) for name, default in defaults.items()},
        "PREFECT_LOGGING_LEVEL": os.environ.get("CAMERA_LOGGING_LEVEL", "INFO"),
        "PREFECT_LOGGING_EXTRA_LOGGERS": "camera",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # four more processes, for what nobody here uses
    }


@dataclass(frozen=True)
class _Starter:
    """Starts what does not run yet."""

    services: Services
    environment: dict[str, str]
    home: Path
    say: Callable[[str], None]

    def prefect(self, port: int | None) -> str:
        """The address of the server's API. From now on the environment holds the secret for its clients."""
        secret = os.environ.get("PREFECT_SERVER_API_AUTH_STRING") or project_secret(self.home)
        self.environment["PREFECT_API_AUTH_STRING"] = secret
        own = {"PREFECT_SERVER_API_AUTH_STRING": secret}
        return self._server("prefect", "the Prefect server", port, PREFECT_PORT, own)

    def mlflow(self, project: Project, port: int | None) -> str:
        """The address of the MLflow UI."""
        if (database := database_of(project.mlflow_uri)) is not None:
            ready_database(database)
        own = {
            SECRET: project_secret(self.home),
            "MLFLOW_BACKEND_STORE_URI": project.mlflow_uri,
            "MLFLOW_DEFAULT_ARTIFACT_ROOT": project.mlflow_artifacts.as_uri(),
        }
        return self._server("mlflow", "the MLflow UI", port, MLFLOW_PORT, own)

    def _server(self, name: str, title: str, port: int | None, default: int, own: dict[str, str]) -> str:
        known = self.services.known().get(name)
        if known is not None and known.url is not None:
            if known.alive:
                _check_guarded(known)
                return known.url
            port = port or httpx.URL(known.url).port  # the one it had: workers and bookmarks know it
        port = choose_port(port, default, f"--{name}-port")
        origin = f"http://{HOST}:{port}"
        url = f"{origin}/api" if name == "prefect" else origin
        if name == "prefect":
            own = own | _addresses(url) | {"PREFECT_SERVER_CORS_ALLOWED_ORIGINS": origin}
        self.say(f"starting {title} on {HOST}:{port}")
        command = python("uvicorn", "--factory", f"flows.guard:{name}_server", "--app-dir", str(_CHECKOUT))
        command += ["--host", HOST, "--port", str(port), "--log-level", "warning"]
        service = self.services.start(name, command, self.environment | own, url=url)
        wait_until(lambda: _answers(f"{url}/health"), service, START_SECONDS)
        return url

    def worker(self, project: Project, pool: str) -> list[str]:
        """Start a worker for a pool; the names of the killed runs that are scheduled again for it."""
        from prefect.client.orchestration import get_client
        from prefect.exceptions import ObjectNotFound

        from flows.recovery import recover

        name = f"worker-{pool}"
        known = self.services.known().get(name)
        if known is not None and known.alive:
            return []
        with get_client(sync_client=True) as client:
            try:
                client.read_work_pool(pool)
            except ObjectNotFound:
                raise CameraError(
                    f"--pool {pool}: there is no such work pool; {' and '.join(POOLS)} exist"
                ) from None
        recovered = recover(project.home)
        self.say(f"starting a worker for the pool {pool}")
        began = datetime.now(UTC)
        command = python("prefect", "worker", "start", "--pool", pool)
        service = self.services.start(name, command, self.environment)

        def polls() -> bool:
            with get_client(sync_client=True) as client:
                workers = client.read_workers_for_work_pool(pool)
            seen = [worker.last_heartbeat_time for worker in workers]
            return any(time is not None and time >= began for time in seen)

        wait_until(polls, service, START_SECONDS)
        return recovered


def _prepare(served: Served, webhook: str | None) -> None:
    from prefect.client.orchestration import get_client  # two seconds; only `camera serve` pays them
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists
    from prefect.workers.process import ProcessWorker

    from flows.automations import apply_automations
    from flows.device_limits import create_limits, limit_name

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

    from camera.devices import find_device

    best = find_device("auto")
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


def _check_guarded(service: Service) -> None:
    """Refuse to go on with a server that an earlier version started, which asks nobody who they are.

    Raises:
        CameraError: if it answers without the secret.
    """
    question = "/admin/version" if service.name == "prefect" else "/"
    if _answers(f"{service.url}{question}"):
        raise CameraError(
            f"{service.name} at {service.url} runs since before it asked for a secret: `camera serve --stop`, then `camera serve`"
        )


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).status_code == 200
    except httpx.HTTPError:
        return False
