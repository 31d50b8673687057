"""Which deployment runs are at work on this host, and which were at work when their process died.

A run holds a lock (flock) on a small file named after it. The kernel frees the lock of a process that dies, however
it dies; so a file whose lock can be taken belongs to a run that was killed. After a worker is back those runs are
scheduled again, and go on from the store.
"""

import fcntl
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

from flows.automations import NO_HEARTBEAT

TRIES = 4
"""A run is not scheduled again after so many starts: something kills it every time."""
_log = logging.getLogger("camera.presence")


@contextmanager
def present(home: Path) -> Iterator[None]:
    """Hold this run's file while its flow runs. A run that no deployment made is whoever called it's own matter."""
    context = FlowRunContext.get()
    run = None if context is None else context.flow_run
    if run is None or run.deployment_id is None:
        yield
        return
    folder = _folder(home)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / str(run.id)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def recover(home: Path) -> list[str]:
    """Schedule again, at once, the runs whose process on this host was killed; their names.

    Left alone are runs that have ended since, runs whose process is alive (a worker was killed and its children
    were not), and runs that were started `TRIES` times, which become Crashed.
    """
    recovered = []
    with get_client(sync_client=True) as client:
        for path in sorted(_folder(home).glob("*")):
            with path.open("r+") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                name = _schedule_again(client, UUID(path.name))
                if name is not None:
                    recovered.append(name)
                path.unlink(missing_ok=True)
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
