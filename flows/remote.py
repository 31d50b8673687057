"""A stage performed by a deployment on another host, over the shared store.

The request travels, and only the end of the run comes back: the artifact is taken from the store, whole and verified.
"""

import logging
import time
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, WorkerStatus
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings
from prefect.states import Cancelling
from pydantic import Field

from camera.digests import digest_files, digest_json
from camera.errors import CameraError
from camera.options import Options
from tasks.options import Sections
from tasks.recipe import BenchmarkHostOptions
from tasks.stage import Input, Request, RunReferences, Stage, find
from tasks.store import Artifact, Store

POLL_SECONDS = 5
_log = logging.getLogger("camera.remote")


class RemoteInput(Options):
    """One input of a request, as another host finds it."""

    digest: str
    """Content digest that it must have there."""
    stage: str | None = None
    """For an artifact of the store: its stage."""
    key: str | None = None
    """For an artifact of the store: its key."""
    path: str | None = None
    """For a source outside the store: its absolute path, the same on both hosts."""
    about: dict[str, Any] = Field(default_factory=dict)
    """For a source: what lineage records of it, with the sha256 of its files."""

    @classmethod
    def of(cls, given: Input) -> "RemoteInput":
        if given.stage is not None:
            return cls(digest=given.digest, stage=given.stage, key=given.key)
        return cls(digest=given.digest, path=str(given.path.resolve()), about=given.about)


class RemoteRequest(Options):
    """A request as plain values."""

    step: str
    """What people call it."""
    key: str
    """The key it must come out with; another means that the hosts do not run the same code."""
    options: dict[str, dict[str, Any]]
    """What is asked for, by section."""
    facts: dict[str, Any]
    """What else the result depends on."""
    inputs: dict[str, RemoteInput]
    """What it reads."""

    @classmethod
    def of(cls, request: Request) -> "RemoteRequest":
        inputs = {name: RemoteInput.of(given) for name, given in request.inputs.items()}
        options = {name: given.model_dump(mode="json") for name, given in request.options.items()}
        return cls(step=request.step, key=request.key, options=options, facts=request.facts, inputs=inputs)

    def restored(self, stage: Stage, store: Store, references: RunReferences) -> Request:
        """The request on this host, its inputs found and verified.

        Raises:
            CameraError: if an input is not here or is another, or the code here means something else.
        """
        inputs = {name: _found(name, given, store) for name, given in self.inputs.items()}
        options = {name: stage.options[name].model_validate(given) for name, given in self.options.items()}
        request = Request(self.step, stage, Sections(options), inputs, self.facts, references)
        if request.key != self.key:
            raise CameraError(
                f"{self.step}: this host makes key {request.key[:12]} of what should be {self.key[:12]}; "
                "install the same version of the pipeline on both hosts"
            )
        return request


def _found(name: str, given: RemoteInput, store: Store) -> Input:
    if given.stage is not None and given.key is not None:
        artifact = store.find(given.stage, given.key)
        if artifact is None or artifact.digest != given.digest:
            raise CameraError(
                f"input {name}: {given.stage}/{given.key[:12]} is not in {store.root}: both hosts need the same "
                "store; set CAMERA_HOME to a folder that they share"
            )
        return Input.of(artifact)
    path = Path(given.path or "")
    expected = given.about.get("files", {})
    if not path.exists():
        raise CameraError(f"input {name}: {path} is not on this host; give it the same path there")
    here = digest_files(path, expected) if path.is_dir() else {}
    if here != expected or digest_json(here) != given.digest:
        raise CameraError(f"input {name}: {path} is not the same on this host: its files have other sha256")
    return Input(path, given.digest, about=given.about)


def perform_remotely(store: Store, request: Request, host: BenchmarkHostOptions) -> tuple[Artifact, bool]:
    """The artifact of a request from the store, or made by the deployment that the options name.

    Returns:
        The artifact, and whether it was there already.

    Raises:
        CameraError: if there is no such deployment, no worker begins in time, the run there does not complete in
            time, or it does and the store has no artifact.
    """
    if (artifact := find(store, request)) is not None:
        return artifact, True
    deployment = host.deployment
    with get_client(sync_client=True) as client:
        pool = _pool(client, deployment)
        run = run_deployment(
            deployment, parameters={"request": RemoteRequest.of(request).model_dump(mode="json")}, timeout=0
        )
        assert isinstance(run, FlowRun)
        _log.info("%s runs as %s on pool %s", request.step, run.name, pool)
        try:
            _wait(client, run.id, deployment, pool, host)
        except BaseException:
            client.set_flow_run_state(
                run.id, Cancelling(message="the run that asked for it does not wait any more")
            )
            raise
    artifact = find(store, request)
    if artifact is None:
        raise CameraError(
            f"{request.step}: {deployment} completed as {run.name}, and {store.root} has no artifact of it: "
            "its worker uses another store; set CAMERA_HOME to a folder that both hosts share"
        )
    return artifact, False


def _pool(client: SyncPrefectClient, deployment: str) -> str:
    try:
        found = client.read_deployment_by_name(deployment)
    except (ObjectNotFound, ValueError):
        api = get_current_settings().api.url or "the API in this process; set PREFECT_API_URL"
        raise CameraError(
            f"benchmark_host.deployment: {deployment} does not exist at {api}; `prefect deployment ls` lists what does"
        ) from None
    if found.work_pool_name is None:
        raise CameraError(
            f"benchmark_host.deployment: {deployment} has no work pool, so no worker would run it"
        )
    return found.work_pool_name


def _wait(
    client: SyncPrefectClient, run_id: UUID, deployment: str, pool: str, host: BenchmarkHostOptions
) -> None:
    began = time.monotonic()
    while True:
        run = client.read_flow_run(run_id)
        state = run.state
        waited = time.monotonic() - began
        if state is not None and state.is_final():
            if not state.is_completed():
                raise CameraError(
                    f"{deployment} ended as {state.name} ({run.name}): {state.message or 'no message'}"
                )
            return
        if (state is None or state.is_scheduled()) and waited > host.start_within:
            raise CameraError(f"{deployment}: {_why_none_began(client, pool)} within {host.start_within} s")
        if waited > host.finish_within:
            raise CameraError(
                f"{deployment}: {run.name} is not done after {host.finish_within} s and was cancelled; "
                "raise benchmark_host.finish_within if it needs longer"
            )
        time.sleep(POLL_SECONDS)


def _why_none_began(client: SyncPrefectClient, pool: str) -> str:
    workers = client.read_workers_for_work_pool(pool)
    online = [worker.name for worker in workers if worker.status == WorkerStatus.ONLINE]
    if not online:
        return (
            f"no worker polls the work pool {pool}; on a host with the device run "
            f"`camera serve --pool {pool}` with this PREFECT_API_URL. None began"
        )
    return f"the workers of pool {pool} ({', '.join(online)}) are busy; none began"
