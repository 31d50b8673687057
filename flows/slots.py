"""Slots of Prefect's global concurrency limits, held for as long as the server can be made to remember them.

Prefect's own `concurrency` gives up renewing after three failures, for good, and raises when a slot cannot be given
back: a server that is restarted would cost the slot, or the work that was done under it. Here the renewal goes on
until the work ends, takes a slot again that the server forgot, and what the server cannot be told is logged.
"""

import logging
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
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

LEASE_SECONDS = 120
"""A slot whose holder was killed is free after so long, and a quarter of a minute; the server takes no less than 60."""
RENEW_SECONDS = 20
"""A server that is away for less than the difference to `LEASE_SECONDS` loses no slot."""
TRY_SECONDS = 5
"""Between two tries, of a slot that others hold or of a server that does not answer."""
AWAY_SECONDS = 60
"""How long to wait for a server that does not answer before the work begins without a slot; a restart takes 10 to 30 s."""
REQUEST_SECONDS = 15
_LOCKED, _GONE = 423, 410
_log = logging.getLogger("camera.accelerators")


class Slots:
    """One slot of each of some limits, or none yet; and the thread that keeps it."""

    def __init__(self, names: list[str], lease_seconds: float = LEASE_SECONDS) -> None:
        """
        Args:
            names: of limits; those that are missing are created, with one slot.
            lease_seconds: how long the server keeps a slot that is not renewed; at least 60.
        """
        self._names = names
        self._seconds = lease_seconds
        self._lease: UUID | None = None
        self._ended = threading.Event()
        self._keeper = threading.Thread(target=copy_context().run, args=(self._keep,), daemon=True)

    def take(self, away_seconds: float = AWAY_SECONDS) -> bool:
        """Wait for those who hold the slots, and take them; False if no server answered for so long."""
        until = time.monotonic() + away_seconds
        with _impatient_client() as client:
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
                time.sleep(TRY_SECONDS)

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
            with _impatient_client() as client:
                client.release_concurrency_slots_with_lease(self._lease)
        except httpx.HTTPError as error:
            _log.warning(
                "%s: the server does not answer (%s), so it is free only after %.0f s",
                self._what,
                error,
                self._seconds,
            )

    @property
    def _what(self) -> str:
        return " and ".join(self._names)

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
        told = False
        with _impatient_client() as client:
            while not self._ended.wait(pause):
                try:
                    pause = RENEW_SECONDS if self._renew(client) else TRY_SECONDS
                    told = False
                except httpx.HTTPError as error:
                    pause = TRY_SECONDS
                    if not told:
                        _log.warning("%s: cannot be renewed at present (%s); trying on", self._what, error)
                    told = True

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
                    self._what,
                )
        if self._try(client):
            _log.warning("%s: held again", self._what)
            return True
        return False


@contextmanager
def _impatient_client() -> Iterator[SyncPrefectClient]:
    """A client that fails at once: how long to try is decided here, and Prefect's own retries take a minute."""
    own = {"timeout": REQUEST_SECONDS}
    with (
        temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
        get_client(httpx_settings=own, sync_client=True) as client,
    ):
        yield client


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
