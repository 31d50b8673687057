"""One job per accelerator: a global concurrency limit for each device of each host.

Held for as long as a stage computes, not for a whole run: a run whose stages are cached waits for nobody. The limit
lives on the Prefect server, so without a server (its API then is private to the process) there is none.
"""

import logging
import platform
from collections.abc import Iterator
from contextlib import contextmanager

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.settings import get_current_settings

from camera.devices import resolve_device
from tasks.stage import Request

LEASE_SECONDS = 120
"""A slot whose holder was killed is free after so long; a server that is away for less loses no slot."""
_log = logging.getLogger("camera.accelerators")


@contextmanager
def accelerators_of(request: Request) -> Iterator[None]:
    """Hold the device or devices that a stage computes on; waits for those who hold them.

    A stage that computes on no device of its own, or a process without a Prefect server, holds nothing. A renewal
    that fails does not end the stage: the server may be restarting, and the work is not wrong.
    """
    names = limit_names(request)
    if not names or get_current_settings().api.url is None:
        yield
        return
    with get_client(sync_client=True) as client:
        create_limits(names, client)
    _log.info("%s: waiting for %s to be free", request.step, " and ".join(names))
    with concurrency(names, lease_duration=LEASE_SECONDS, strict=True, raise_on_lease_renewal_failure=False):
        yield


def limit_names(request: Request) -> list[str]:
    """The limits of the devices that a request computes on: `camera-host-npu-0`."""
    if "device" not in request.options:
        return []
    device = resolve_device(str(request.settings.get("device", request.options["device"])))
    if device.type == "cpu":
        return [limit_name("cpu", 0)]
    first = device.index or 0
    return [limit_name(device.type, first + n) for n in range(int(request.settings.get("devices", 1)))]


def limit_name(kind: str, number: int) -> str:
    """Name of the limit of one device of this host."""
    return f"camera-{platform.node()}-{kind}-{number}"


def create_limits(names: list[str], client: SyncPrefectClient) -> None:
    """Create the limits that are missing, one slot each; a limit that somebody changed stays as it is."""
    for name in names:
        try:
            client.read_global_concurrency_limit_by_name(name)
        except ObjectNotFound:
            try:
                client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=1))
            except ObjectAlreadyExists:
                _log.debug("%s was created by another run at this moment", name)
