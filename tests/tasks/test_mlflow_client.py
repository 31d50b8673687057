"""A server that is away costs seconds, is told from an address that is wrong, and is left alone for a while."""

import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from camera.errors import CameraError
from tasks.mlflow_client import Backoff, NotAServer, ServerUnavailable, check_server, is_server, is_transient
from tasks.tracking import Tracker


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@contextmanager
def answering(status: int, body: str, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """The address of a server that answers everything alike, as a proxy or a stranger on the port would."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format: str, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"{'http' if tls is None else 'https'}://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_nothing_is_asked_of_a_database() -> None:
    check_server("sqlite:////nowhere/mlflow.db")
    assert not is_server("postgresql://db/mlflow")
    assert is_server("HTTPS://mlflow.example.org")


def test_a_refused_connection_is_told_in_a_few_words_at_once() -> None:
    started = time.monotonic()
    with pytest.raises(ServerUnavailable, match=r"^\[Errno 111\] Connection refused$"):
        check_server("http://127.0.0.1:9")
    assert time.monotonic() - started < 5


def test_silence_is_waited_for_a_few_seconds_and_not_again(silent: str) -> None:
    check_imports_are_paid()
    started = time.monotonic()
    with pytest.raises(ServerUnavailable, match="no answer within 5 s"):
        check_server(silent)
    assert 4 < time.monotonic() - started < 10


def check_imports_are_paid() -> None:
    with pytest.raises(ServerUnavailable):
        check_server("http://127.0.0.1:9")


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_server_that_says_it_cannot_now_is_away(status: int) -> None:
    with (
        answering(status, "upstream is gone") as uri,
        pytest.raises(ServerUnavailable, match=f"answers {status}") as away,
    ):
        check_server(uri)
    assert is_transient(away.value)


@pytest.mark.parametrize("status", [200, 401, 403, 404])
def test_an_answer_in_json_or_a_refusal_is_an_answer(status: int) -> None:
    with answering(status, '{"error_code": "RESOURCE_DOES_NOT_EXIST"}') as uri:
        check_server(uri)


def test_a_page_is_no_mlflow_server() -> None:
    with (
        answering(200, "<html>It works!") as uri,
        pytest.raises(NotAServer, match="no MLflow server") as other,
    ):
        check_server(uri)
    assert not is_transient(other.value)


def test_a_certificate_that_nobody_vouches_for_is_refused(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "1",
        "-subj",
        "/CN=127.0.0.1",
    ]
    subprocess.run([*make, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with answering(200, "{}", context) as uri, pytest.raises(NotAServer, match="certificate is not trusted"):
        check_server(uri)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_server_that_refuses_this_run_stops_it(
    status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with answering(status, "You are not welcome") as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises(CameraError, match=rf"{status}(.|\n)*tracking.enabled=false"):
            Tracker("experiment", "key", "tiny", tmp_path)


def test_trackers_of_one_process_wait_for_the_same_silence_once(
    silent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", silent)
    started = time.monotonic()
    for member in range(10):
        tracker = Tracker("experiment", f"member {member}", "tiny", tmp_path)
        tracker.log_recipe({"prune": {"ratio": 0.2}}, {})
        tracker.finish("FINISHED")
        assert tracker.run_id is None
        assert str(tracker.pending).startswith(f"MLflow at {silent} cannot be used: ")
    assert time.monotonic() - started < 15


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("http://", "names no host"),
        ("http:///mlflow", "names no host"),
        ("http://127.0.0.1:99999", "out of range"),
        ("http://127.0.0.1:port", "port"),
        ("http://127.0.0.1:0", "port 0"),
        ("https://[::1", "Invalid IPv6"),
    ],
)
def test_a_malformed_address_is_said_to_be_one(uri: str, reason: str) -> None:
    with pytest.raises(NotAServer, match=reason):
        check_server(uri)


class Clock:
    """Time that passes when told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now

    def after(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def fail(backoff: Backoff, clock: Clock, seconds: float) -> None:
    with suppress(ServerUnavailable), backoff.attempt():
        clock.after(seconds)
        raise ServerUnavailable


def test_a_night_with_a_silent_server_costs_less_than_a_minute(clock: Clock) -> None:
    backoff, asked = Backoff(clock), 0
    for _ in range(8 * 3600):
        if backoff.may_try(urgent=False):
            fail(backoff, clock, 5.0)
            asked += 1
        clock.after(1)
    assert 5 * asked <= 50


def test_a_refusing_server_is_asked_every_minute_since_that_costs_nothing(clock: Clock) -> None:
    backoff, asked = Backoff(clock), 0
    for _ in range(60):
        if backoff.may_try(urgent=False):
            fail(backoff, clock, 0.01)
            asked += 1
        clock.after(60)
    assert asked == 60
    fail(backoff, clock, 0.01)
    assert not backoff.may_try(urgent=False)
    assert backoff.may_try(urgent=True)


def test_the_end_of_a_run_asks_a_silent_server_once_more_but_not_within_a_minute(clock: Clock) -> None:
    backoff = Backoff(clock)
    for _ in range(4):
        fail(backoff, clock, 5.0)
    assert not backoff.may_try(urgent=True)
    clock.after(61)
    assert backoff.may_try(urgent=True)
    assert not backoff.may_try(urgent=False)
    with backoff.attempt():
        pass
    assert backoff.may_try(urgent=False)
