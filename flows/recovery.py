"""Recovery of deployment runs whose process on this host was killed.

A run locks a small file named after it, and the kernel frees the lock of a process that dies. So a file whose lock is
free belongs to a run that was killed: once a worker is back it is scheduled again, and resumes from the store.
"""

import logging
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound
from prefect.states import Crashed, Scheduled

from camera import shutdown
from camera.locks import lock, try_lock
from flows.automations import NO_HEARTBEAT
from tasks.project import Project

TRIES = 4
"""A run is not scheduled again after so many starts: something kills it every time."""
_log = logging.getLogger("camera.recovery")


@contextmanager
def running_flow() -> Iterator[Project]:
    """The project, configured, while a flow of it runs; signals are handled, and the flow run's file is locked.

    A run that no deployment made locks no file, for nobody recovers it; and its process, a script's or notebook's, is
    not ended for a native call.
    """
    shutdown.reinstall()
    project = Project.here()
    project.configure()
    context = FlowRunContext.get()
    run = None if context is None else context.flow_run
    if run is None or run.deployment_id is None:
        yield project
        return
    with lock(_folder(project.home) / str(run.id)), shutdown.watched():
        yield project


def recover(home: Path) -> list[str]:
    """Schedule again, at once, the runs whose process on this host was killed; their names.

    Left alone are runs that have ended since, runs whose process is alive (a worker was killed and its children
    were not), and runs that were started `TRIES` times, which become Crashed.
    """
    recovered = []
    with get_client(sync_client=True) as client:
        for path in sorted(_folder(home).glob("*")):
            with try_lock(path) as killed:
                if killed and (name := _schedule_again(client, UUID(path.name))) is not None:
                    recovered.append(name)
    return recovered


def _schedule_again(client: SyncPrefectClient, run_id: UUID) -> str | None:
    try:
        run = client.read_flow_run(run_id)
    except ObjectNotFound:
        return None
    state = run.state
    lost = state is not None and state.is_crashed() and (state.message or "").startswith(NO_HEARTBEAT)
    if state is None or (state.is_final() and not lost) or state.is_cancelling():
        return None
    if run.run_count >= TRIES:
        message = f"its process was killed {run.run_count} times on {platform.node()}"
        client.set_flow_run_state(run_id, Crashed(message=message), force=True)
        return None
    message = f"its process on {platform.node()} was killed; what it had finished is taken from the store"
    client.set_flow_run_state(run_id, Scheduled(name="AwaitingRetry", message=message), force=True)
    _log.info("%s is scheduled again: %s", run.name, message)
    return run.name


def _folder(home: Path) -> Path:
    return home / "running" / platform.node()
