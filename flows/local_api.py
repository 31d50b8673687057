"""Prefect's API where none is configured: a process on loopback that ends when this one does, however it ends.

Prefect starts it by itself, and stops it when Python exits. After kill -9 it would run for ever, with the dead run's
output still open. What is used of Prefect's private names (`SubprocessASGIServer`, the queue of `EventsWorker`) is in
this file only.
"""

import queue
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from contextlib import suppress

from prefect.client.orchestration import get_client
from prefect.events.worker import EventsWorker
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import get_current_settings

from camera.errors import NetworkError
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
        _beginning = _in_thread(_start)


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
    """Ask the API that is in use whether it is there, before a run is begun on it.

    Raises:
        NetworkError: if it does not answer.
    """
    with get_client(sync_client=True) as client:
        problem = client.api_healthcheck()
    if problem is not None:
        where = without_secrets(get_current_settings().api.url or "this process")
        raise NetworkError(
            f"Prefect's API at {where} does not answer ({problem}): start it, unset PREFECT_API_URL to run without a "
            "server, or give --no-prefect; what is finished is kept in either case"
        )


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
