"""One job per accelerator: a global concurrency limit for each device of each host.

Held for as long as a stage computes, not for a whole run: a run whose stages are cached waits for nobody. The limit
lives on the Prefect server, so without a server (its API then is private to the process) there is none, and a server
that ends in the middle takes its limits along: the stage goes on, and says so.
"""

import logging
import platform
from collections.abc import Iterator
from contextlib import contextmanager

from prefect.settings import get_current_settings

from camera.devices import resolve_device
from flows.slots import AWAY_SECONDS, LEASE_SECONDS, Slots
from tasks.stage import Request

_log = logging.getLogger("camera.accelerators")
_away = False
"""Whether the server did not answer when it was last asked; it is waited for once, not at every stage."""


@contextmanager
def accelerators_of(request: Request) -> Iterator[None]:
    """Hold the device or devices that a stage computes on; waits for those who hold them.

    A stage that computes on no device of its own, or a process without a Prefect server, holds nothing. A server
    that is away is waited for, as it may be restarting, once in a process; then the stage begins without.
    """
    names = limit_names(request)
    if not names or get_current_settings().api.url is None:
        yield
        return
    with slots_of(names, request.step):
        yield


@contextmanager
def slots_of(names: list[str], step: str, lease_seconds: float = LEASE_SECONDS) -> Iterator[None]:
    """Hold one slot of each of these limits, which are created if they are missing.

    Args:
        names: of limits, as `limit_names` gives them.
        step: who holds them, for the log.
        lease_seconds: how long the server keeps the slots of a holder that was killed; at least 60.
    """
    global _away
    slots = Slots(names, lease_seconds)
    _log.info("%s: waiting for %s to be free", step, " and ".join(names))
    _away = not slots.take(0 if _away else AWAY_SECONDS)
    if _away:
        _log.warning("%s: the Prefect server does not answer, so another job may use the same device", step)
    slots.keep()
    try:
        yield
    finally:
        slots.give_back()


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
