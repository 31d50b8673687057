"""What a Prefect server that does not let us in, or is none, costs: one line, and nothing is started."""

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from camera.errors import CameraError
from flows.commands import serving
from flows.secret import secret_file
from flows.services import Services


@pytest.fixture
def refusing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[BaseHTTPRequestHandler]]:
    """A server, in use here, that says it is well and refuses all else with the status that the class holds."""

    class Refuse(BaseHTTPRequestHandler):
        status = 401

        def do_GET(self) -> None:
            self.send_response(200 if self.path.endswith("/health") else self.status)
            self.end_headers()
            self.wfile.write(json.dumps({}).encode())

        do_POST = do_GET

        def log_message(self, format: str, *arguments: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuse)
    threading.Thread(target=server.serve_forever).start()
    url = f"http://127.0.0.1:{server.server_port}/api"
    monkeypatch.setattr(os, "environ", {**os.environ, "PREFECT_API_URL": url, "CAMERA_HOME": str(tmp_path)})
    monkeypatch.chdir(tmp_path)
    Path("prefect.yaml").write_text("deployments: []\n")
    with temporary_settings({PREFECT_API_URL: url}):
        yield Refuse
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "wants to know who asks: set PREFECT_API_AUTH_STRING"), (404, "is no Prefect API")],
)
def test_a_server_that_refuses_is_named_before_anything_is_begun_on_it(
    refusing: type[BaseHTTPRequestHandler], tmp_path: Path, status: int, words: str
) -> None:
    refusing.status = status
    for command in (serving.automations, serving.serve):
        with pytest.raises(CameraError, match=words):
            command()
    assert Services(tmp_path).known() == {}
    assert not secret_file(tmp_path).exists()
