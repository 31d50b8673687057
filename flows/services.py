"""The servers of one machine: started apart from the terminal, recorded, found again, and ended; those and no others.

A service is known by its pid and start, so that another process that got the pid is never taken for it. All that it
starts inherits a mark in its environment; what is left of a killed service is found by that.
"""

import os
import platform
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from camera.errors import CameraError
from camera.files import read_json, write_json
from camera.locks import LockedError, lock
from camera.processes import start_of
from tasks.project import own_folder

MARK = "CAMERA_SERVED_BY"
HOST = "127.0.0.1"
GRACE_SECONDS = 60
"""How long a service has to end by itself: a worker lets its runs record that they go on later."""


@dataclass(frozen=True)
class Service:
    """One process that was started here."""

    name: str
    pid: int
    born: str
    """What another process with this pid would not have: see `start_of`."""
    mark: str
    log: str
    url: str | None = None

    @property
    def alive(self) -> bool:
        """Whether this very process runs."""
        return start_of(self.pid) == self.born

    def family(self) -> list[psutil.Process]:
        """The process and all that it started, also what outlived it."""
        found = []
        for process in psutil.process_iter():
            try:
                marked = process.environ().get(MARK) == self.mark
                if marked and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue  # it ended, or it is another user's and so not ours
        return found


class Services:
    """The record of the services of one project on this host, in `<home>/serve/<host>/`: hosts and users may share a home."""

    def __init__(self, home: Path) -> None:
        self.folder = own_folder(home / "serve") / platform.node()
        self._file = self.folder / "services.json"

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep others from starting or stopping at the same time.

        Raises:
            CameraError: if somebody does.
        """
        with ExitStack() as stack:
            try:
                stack.enter_context(lock(self.folder / "lock", wait=False))
            except LockedError as error:
                raise CameraError(
                    f"another `camera serve` is starting or stopping ({error}); try again when it is done"
                ) from None
            yield

    def known(self) -> dict[str, Service]:
        """Every service that this user started and did not stop since, dead or alive."""
        if not self._file.is_file():
            return {}
        return {entry["name"]: Service(**entry) for entry in read_json(self._file)}

    def start(
        self, name: str, command: list[str], environment: Mapping[str, str], url: str | None = None
    ) -> Service:
        """Start a service in a session of its own, its output in `<name>.log` beside the record."""
        log = self.folder / f"{name}.log"
        mark = f"{name}-{uuid.uuid4().hex}"
        with log.open("ab") as output:
            process = subprocess.Popen(
                command,
                env={**environment, MARK: mark},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        service = Service(name, process.pid, start_of(process.pid) or "ended at once", mark, str(log), url)
        self._write({**self.known(), name: service})
        return service

    def stop(self) -> list[str]:
        """End all services and what they started, the latest first: SIGTERM, and SIGKILL after `GRACE_SECONDS`.

        Returns:
            The names of those that ran. Stopping what does not run is no error.
        """
        stopped, known = [], self.known()
        for name in reversed(list(known)):
            service = known.pop(name)
            family = service.family()
            if service.alive:
                main = psutil.Process(service.pid)
                main.terminate()
                psutil.wait_procs([main], timeout=GRACE_SECONDS)
            for process in [*family, *service.family()]:
                if process.is_running():  # of this start time; psutil looks
                    process.kill()
            psutil.wait_procs(family, timeout=10)
            if family:
                stopped.append(name)
            self._write(known)
        return stopped

    def _write(self, services: dict[str, Service]) -> None:
        write_json(self._file, [asdict(service) for service in services.values()])


def wait_until(holds: Callable[[], bool], service: Service, seconds: float) -> None:
    """Wait for a service to be of use.

    Raises:
        CameraError: if it ends or time does, with the last lines of its log.
    """
    until = time.monotonic() + seconds
    while not holds():
        if not service.alive or time.monotonic() > until:
            what = f"is not ready after {seconds:.0f} s" if service.alive else "ended while it started"
            lines = Path(service.log).read_text(errors="replace").splitlines()[-12:]
            raise CameraError(f"{service.name} {what}; {service.log} ends with:\n  " + "\n  ".join(lines))
        time.sleep(0.5)


def choose_port(wanted: int | None, default: int, option: str) -> int:
    """The port that was asked for, or the first free one from the default on.

    Raises:
        CameraError: if the one that was asked for is in use, or fifty in a row are.
    """
    for port in range(default, default + 50) if wanted is None else [wanted]:
        if _free(port):
            return port
    if wanted is None:
        raise CameraError(
            f"no port from {default} to {default + 49} is free on {HOST}; give one with {option}"
        )
    raise CameraError(f"{option} {wanted}: the port is in use on {HOST}; give another, or leave it out")


def _free(port: int) -> bool:
    try:
        socket.create_server((HOST, port)).close()  # as the servers do: a port just left is free
    except OSError:
        return False
    return True


def python(module: str, *arguments: str) -> list[str]:
    """A command that runs a module in this interpreter."""
    return [sys.executable, "-m", module, *arguments]


def inherited() -> dict[str, str]:
    """This process's environment, with its own programs first on the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, "PATH": path}
