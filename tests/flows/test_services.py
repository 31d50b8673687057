"""Servers that are started apart from the terminal: found again, and ended without touching anything else."""

import os
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from camera.errors import CameraError
from flows import services as module
from flows.services import Services, choose_port, wait_until

SLEEPER = [sys.executable, "-c", "import time; time.sleep(600)"]
PARENT = [
    sys.executable,
    "-c",
    "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], "
    "start_new_session=True); print('started', flush=True); time.sleep(600)",
]


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    made = Services(tmp_path)
    yield made
    made.stop()


def begun(services: Services, name: str) -> bool:
    return "started" in (services.folder / f"{name}.log").read_text()


def test_what_was_started_is_known_to_another_process_and_ends_on_stop(services: Services, tmp_path: Path):
    with services.exclusive():
        service = services.start("sleeper", SLEEPER, os.environ)
    again = Services(tmp_path)
    assert again.known() == {"sleeper": service}
    assert service.alive
    assert again.stop() == ["sleeper"]
    assert not service.alive
    assert again.stop() == [], "stopping twice is no error"


def test_a_process_that_got_the_same_pid_is_left_alone(services: Services):
    services.folder.mkdir(parents=True, exist_ok=True)
    ours = services.start("sleeper", SLEEPER, os.environ)
    stranger = replace(ours, name="old", born="at another time", mark="another")
    services._write({"old": stranger})
    assert not stranger.alive
    assert services.stop() == []
    assert ours.alive
    services._write({"sleeper": ours})


def test_children_of_a_killed_service_are_ended_too(services: Services):
    services.folder.mkdir(parents=True, exist_ok=True)
    service = services.start("parent", PARENT, os.environ)
    wait_until(lambda: begun(services, "parent"), service, 20)
    parent = psutil.Process(service.pid)
    (child,) = parent.children()
    parent.kill()
    parent.wait(10)
    assert not service.alive
    assert child.is_running()
    assert services.stop() == ["parent"]
    until = time.monotonic() + 10
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE and time.monotonic() < until:
        time.sleep(0.05)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_what_does_not_end_politely_is_killed(services: Services, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.5)
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('started', flush=True); time.sleep(600)"
    services.folder.mkdir(parents=True, exist_ok=True)
    service = services.start("stubborn", [sys.executable, "-c", stubborn], os.environ)
    wait_until(lambda: begun(services, "stubborn"), service, 20)
    assert services.stop() == ["stubborn"]
    assert not service.alive


def test_a_service_that_ends_while_it_starts_is_told_with_its_log(services: Services):
    services.folder.mkdir(parents=True, exist_ok=True)
    broken = services.start(
        "broken", [sys.executable, "-c", "raise SystemExit('no such database')"], os.environ
    )
    with pytest.raises(CameraError, match=r"broken ended while it started(?s:.)*no such database"):
        wait_until(lambda: False, broken, 20)


def test_two_that_start_at_once_do_not_meet(services: Services):
    with (
        services.exclusive(),
        pytest.raises(CameraError, match="another `camera serve`"),
        services.exclusive(),
    ):
        pass


def test_a_port_in_use_is_told_if_it_was_asked_for_and_passed_over_if_not():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(CameraError, match=f"--prefect-port {port}: the port is in use"):
            choose_port(port, 4200, "--prefect-port")
        assert choose_port(None, port, "--prefect-port") > port
