"""One job per accelerator: a global concurrency limit of the Prefect server for each device of each host.

Held while a stage computes, not for a whole run: a run whose stages are cached waits for nobody. Prefect's own
`concurrency` gives up renewing after three failures, for good, and raises when a slot cannot be given back: a server
that is restarted would cost the slot, or the work that was done under it. Here the renewal goes on until the work
ends, takes a slot again that the server forgot, and logs what the server cannot be told.
"""

import logging
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import copy_context
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, get_current_settings, temporary_settings

from camera.devices import devices_of
from tasks.stage import Request

LEASE_SECONDS = 120
"""A slot whose holder was killed is free after so long, and a quarter of a minute; the server takes no less than 60."""
RENEW_SECONDS = 20
"""A server that is away for less than the difference to `LEASE_SECONDS` loses no slot."""
RETRY_SECONDS = 5
"""Between two tries, of a slot that others hold or of a server that does not answer."""
AWAY_SECONDS = 60
"""How long to wait for a server that does not answer before the work begins without a slot; a restart takes 10 to 30 s."""
REQUEST_SECONDS = 15
_LOCKED, _GONE = 423, 410
_log = logging.getLogger("camera.devices")
_away = False
"""Whether the server did not answer when it was last asked; it is waited for once in a process, not at every stage."""


@contextmanager
def device_slots(request: Request) -> Iterator[None]:
    """Hold the device or devices that a stage computes on; waits for those who hold them.

    Nothing is held for a stage that computes on no device of its own, or without a Prefect server. A server that is
    away is waited for, as it may be restarting, once in a process; then the stage begins without.
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
    slots = _Slots(names, lease_seconds)
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
    how = [section.execution() for section in request.options.values()]
    settings = next((each for each in how if "device" in each), request.facts)
    if "device" not in settings:
        return []
    devices = dict.fromkeys(devices_of(str(settings["device"]), int(settings.get("devices", 1))))
    # Rounding to the nearest gives the same everywhere, so that no fact names a device: it shares a CPU with others.
    shares = "device" not in request.facts
    numbers = [(device.type, device.index or 0) for device in devices if device.type != "cpu" or not shares]
    return [limit_name(*number) for number in numbers]


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


class _Slots:
    """One slot of each of some limits, or none yet; and the thread that keeps it."""

    def __init__(self, names: list[str], lease_seconds: float) -> None:
        self._names = names
        self._label = " and ".join(names)
        self._seconds = lease_seconds
        self._lease: UUID | None = None
        self._ended = threading.Event()
        self._keeper = threading.Thread(target=copy_context().run, args=(self._keep,), daemon=True)

    def take(self, away_seconds: float) -> bool:
        """Wait for those who hold the slots, and take them; False if no server answered for so long."""
        until = time.monotonic() + away_seconds
        with _client() as client:
            while True:
                try:
                    if self._try(client):
                        return True
                    until = time.monotonic() + away_seconds
                except httpx.HTTPError as error:
                    if isinstance(error, httpx.HTTPStatusError) and not error.response.is_server_error:
                        raise
                    if time.monotonic() >= until:
                        return False
                time.sleep(RETRY_SECONDS)

    def keep(self) -> None:
        """Renew from now on, in a thread; a slot that was not taken or is lost is taken as soon as it can be."""
        self._keeper.start()

    def give_back(self) -> None:
        """End the renewal and free the slots; if the server does not answer, the lease ends by itself."""
        self._ended.set()
        self._keeper.join()
        if self._lease is None:
            return
        try:
            with _client() as client:
                client.release_concurrency_slots_with_lease(self._lease)
        except httpx.HTTPError as error:
            message = "%s: the server does not answer (%s), so it is free only after %.0f s"
            _log.warning(message, self._label, error, self._seconds)

    def _try(self, client: SyncPrefectClient) -> bool:
        """Take the slots if they are free."""
        create_limits(self._names, client)
        try:
            response = client.increment_concurrency_slots_with_lease(
                self._names, 1, "concurrency", self._seconds
            )
        except httpx.HTTPStatusError as error:
            if error.response.status_code == _LOCKED:
                return False
            raise
        self._lease = UUID(response.json()["lease_id"])
        return True

    def _keep(self) -> None:
        pause: float = 0 if self._lease is None else RENEW_SECONDS
        warned = False
        with _client() as client:
            while not self._ended.wait(pause):
                try:
                    pause = RENEW_SECONDS if self._renew(client) else RETRY_SECONDS
                    warned = False
                except httpx.HTTPError as error:
                    pause = RETRY_SECONDS
                    if not warned:
                        _log.warning("%s: cannot be renewed at present (%s); trying on", self._label, error)
                    warned = True

    def _renew(self, client: SyncPrefectClient) -> bool:
        if self._lease is not None:
            try:
                client.renew_concurrency_lease(self._lease, self._seconds)
                return True
            except httpx.HTTPStatusError as error:
                if error.response.status_code != _GONE:
                    raise
                self._lease = None
                _log.warning(
                    "%s: the server has given it away, after it was not reached for too long; another job may be on "
                    "it until this one has it again",
                    self._label,
                )
        taken = self._try(client)
        if taken:
            _log.warning("%s: held again", self._label)
        return taken


@contextmanager
def _client() -> Iterator[SyncPrefectClient]:
    """A client that fails at once: how long to try is decided here, and Prefect's own retries take a minute."""
    own = {"timeout": REQUEST_SECONDS}
    with (
        temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
        get_client(httpx_settings=own, sync_client=True) as client,
    ):
        yield client
