"""Prefect's API where none is configured: a process on loopback that ends when this one does, however it ends.

Prefect starts it by itself, and stops it when Python exits. After kill -9 it would run for ever, with the dead run's
output still open. What is used of Prefect's private names (`SubprocessASGIServer`, the queue of `EventsWorker`) is in
this file only.
"""

import os
import queue
import secrets
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from contextlib import suppress

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.context import refresh_global_settings_context
from prefect.events.worker import EventsWorker
from prefect.exceptions import PrefectHTTPStatusError
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import get_current_settings

from camera.errors import CameraError, NetworkError
from camera.secrets import without_secrets

_GUARD = 'while read -r line; do pid=$line; done; [ -z "$pid" ] || kill "$pid"'
"""Remembers the last pid it reads, and ends that process when its standard input closes."""
_POLL_SECONDS = 0.02
_guards: list[subprocess.Popen[str]] = []
_beginning: "Future[None] | None" = None


def begin_local_api() -> None:
    """Begin to start it, and return: it takes ten seconds in another process, time enough for this one's imports."""
    global _beginning
    if _beginning is None:
        _ask_for_a_secret()
        _beginning = _in_thread(_start)


def _ask_for_a_secret() -> None:
    """Let the API that will be started be this process's and its children's alone, by a secret that nothing keeps."""
    if get_current_settings().api.url is None and "PREFECT_SERVER_API_AUTH_STRING" not in os.environ:
        secret = f"camera:{secrets.token_urlsafe(32)}"
        os.environ |= {
            "PREFECT_SERVER_API_AUTH_STRING": secret,
            "PREFECT_API_AUTH_STRING": secret,
            "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": "http://127.0.0.1",  # it has no pages
        }
        refresh_global_settings_context()


def start_local_api() -> None:
    """Start the API that Prefect's client would start, under guard; nothing where an API is configured or it runs.

    Raises:
        NetworkError: if it does not answer in the time that it has.
    """
    begin_local_api()
    assert _beginning is not None
    try:
        _beginning.result()
    except RuntimeError as error:  # what Prefect raises for every reason
        raise NetworkError(
            f"Prefect's own API on this machine did not start ({error}): look at {_home()} and at http_proxy and no_proxy, "
            "or give --no-prefect; what is finished is kept in either case"
        ) from error


def _home() -> str:
    return str(get_current_settings().home)


def check_api() -> None:
    """Ask the API that is in use whether it is there and lets us in, before anything is begun on it.

    Raises:
        NetworkError: if it does not answer.
        CameraError: if it refuses us, or is another service.
    """
    with get_client(sync_client=True) as client:
        problem = client.api_healthcheck()
        where = without_secrets(get_current_settings().api.url or "this process")
        if problem is None:
            _check_admitted(client, where)
    if problem is not None:
        raise NetworkError(
            f"Prefect's API at {where} does not answer ({problem}): start it, or unset PREFECT_API_URL; `camera run` can do "
            "without (--no-prefect), and what is finished is kept in either case"
        )


def _check_admitted(client: SyncPrefectClient, where: str) -> None:
    try:
        client.api_version()
    except PrefectHTTPStatusError as error:
        if error.response.status_code == 404:
            raise CameraError(
                f"what answers at {where} is no Prefect API: look at PREFECT_API_URL"
            ) from error
        if error.response.status_code not in (401, 403):
            return
        raise CameraError(
            f"Prefect's API at {where} wants to know who asks: set PREFECT_API_AUTH_STRING (of `camera serve`: run this in the "
            "same project, or take what `camera serve --secret` says there) or PREFECT_API_KEY; `camera run` can do without (--no-prefect)"
        ) from error


def forget_events() -> None:
    """Drop the events that an API that is gone was to get: at its end the process would try each for seven seconds."""
    with suppress(queue.Empty):
        while True:
            EventsWorker.instance()._queue.get_nowait()


def _in_thread(work: Callable[[], None]) -> "Future[None]":
    """Do some work in a thread that the end of the process does not wait for."""
    done: Future[None] = Future()

    def run() -> None:
        try:
            work()
            done.set_result(None)
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="prefect-api", daemon=True).start()
    return done


def _start() -> None:
    server = SubprocessASGIServer()  # one per process: the client takes this very one
    if get_current_settings().api.url is not None or server.running:
        return
    guard = subprocess.Popen(
        ["sh", "-c", _GUARD],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # a Ctrl-C is for the run, and the guard outlives it
    )
    assert guard.stdin is not None
    _guards.append(guard)  # its pipe is open as long as this process lives
    started = _in_thread(server.start)
    guarded, over = None, False
    while not over:  # as soon as there is a process, and for the next one if its port was taken
        over = bool(wait_for([started], timeout=_POLL_SECONDS).done)
        process = server.server_process
        if process is not None and process.pid != guarded:
            guarded = process.pid
            guard.stdin.write(f"{guarded}\n")
            guard.stdin.flush()
    started.result()
