"""`camera serve` is asked by a page in a browser, by another user of the machine, and by who does not know the secret."""

import base64
import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

from scripts.browser import Browser, find_browser
from tests.conftest import REPOSITORY
from tests.faults.test_networks import environment, free_port

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

HOOK = "https://chat.invalid/hooks/SECRETHOOK"
FLOW = "from prefect import flow\n\n\n@flow\ndef hello():\n    pass\n"
DEPLOYMENTS = """\
name: x
deployments:
  - name: hello
    entrypoint: hello.py:hello
    work_pool:
      name: camera
"""
WEBSOCKETS = (
    "events/in",
    "events/out",
    "logs/out",
    "task_runs/subscriptions/scheduled",
    "work_pools/camera/workers/connect",
)


@dataclass(frozen=True)
class Served:
    folder: Path
    prefect: str
    mlflow: str
    secret: str
    pids: tuple[int, ...]

    @property
    def addresses(self) -> tuple[str, ...]:
        return (
            f"{self.prefect}/api/admin/version",
            f"{self.prefect}/api/block_documents/filter",
            f"{self.mlflow}/",
            f"{self.mlflow}/api/2.0/mlflow/experiments/search",
            f"{self.mlflow}/ajax-api/2.0/mlflow/experiments/search",
        )


def camera(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    given = environment(CAMERA_HOME=str(folder / ".camera"), PYTHONPATH=str(REPOSITORY))
    return subprocess.run(
        [sys.executable, "-m", "camera", *arguments], cwd=folder, env=given, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    folder = Path(
        tempfile.mkdtemp(prefix="served-")
    )  # another user may look here, which pytest's folders forbid
    folder.chmod(0o755)
    (folder / "hello.py").write_text(FLOW)
    (folder / "prefect.yaml").write_text(DEPLOYMENTS)
    (folder / "hook").write_text(HOOK)
    ports = ("--prefect-port", str(free_port()), "--mlflow-port", str(free_port()))
    try:
        done = camera(folder, "serve", "--json", "--webhook", "hook", *ports)
        assert done.returncode == 0, done.stdout + done.stderr
        told = json.loads(done.stdout)
        secret = camera(folder, "serve", "--secret").stdout.strip()
        pids = tuple(service["pid"] for service in told["services"])
        yield Served(folder, told["prefect"], told["mlflow"], secret, pids)
    finally:
        camera(folder, "serve", "--stop")
        shutil.rmtree(folder)


def ask(address: str, **headers: str) -> int:
    way = "POST" if address.endswith("/filter") else "GET"
    content = {"include_secrets": True} if way == "POST" else None
    parameters = {"max_results": 5} if address.endswith("/search") else {}
    return httpx.request(
        way, address, json=content, params=parameters, headers=headers, timeout=60
    ).status_code


def basic(secret: str) -> str:
    return "Basic " + base64.b64encode(secret.encode()).decode()


def test_who_knows_the_secret_is_answered_and_nobody_else(served: Served):
    right, wrong = basic(served.secret), basic(f"camera:{'x' * 43}")
    for address in served.addresses:
        assert ask(address, Authorization=right) == 200, address
        assert ask(address) == 401, address
        assert ask(address, Authorization=wrong) == 401, address
        assert ask(address, Authorization="Basic !!") == 401, address
        assert ask(address, Authorization=f"Bearer {served.secret}") == 401, address


@pytest.mark.parametrize(
    "told",
    [
        {"Host": "evil.example"},
        {"Host": "127.0.0.1.evil.example:5000"},
        {"Host": "evil.example@127.0.0.1"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
        {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"},
    ],
)
def test_a_page_of_another_origin_gets_nothing_though_its_browser_knows_the_secret(
    served: Served, told: dict[str, str]
):
    for address in served.addresses:
        assert ask(address, Authorization=basic(served.secret), **told) == 403, address


def test_no_websocket_says_or_takes_anything_without_the_secret(served: Served):
    for path in WEBSOCKETS:
        address = f"{served.prefect.replace('http', 'ws')}/api/{path}"
        for given in (
            {},
            {"subprotocols": ["prefect"]},
            {"origin": "http://evil.example", "subprotocols": ["prefect"]},
        ):
            assert said(address, given) in ([], ["auth_failure"]), path


def said(address: str, given: dict[str, Any]) -> list[str]:
    """What a websocket says to who does not know the secret, until it is closed."""
    heard: list[str] = []
    try:
        with connect(address, open_timeout=30, **given) as socket:
            socket.send(json.dumps({"type": "auth", "token": "camera:wrong"}))
            socket.send(json.dumps({"type": "filter", "filter": {}}))
            while True:
                heard.append(json.loads(socket.recv(timeout=30)).get("type"))
    except TimeoutError:
        return [*heard, "left open"]
    except (WebSocketException, OSError):
        return heard


def test_the_secret_is_in_no_processs_arguments_and_in_no_file_that_another_user_can_read(served: Served):
    token = served.secret.partition(":")[2]
    assert len(token) >= 32
    for process in psutil.process_iter():
        try:
            arguments = " ".join(process.cmdline())
        except psutil.Error:
            continue
        assert token not in arguments
        assert "SECRETHOOK" not in arguments
    program = (
        "import os, sys\nos.setgroups([])\nos.setgid(65534)\nos.setuid(65534)\n"
        "for folder, _, names in os.walk(sys.argv[1]):\n    for name in names:\n        try:\n"
        "            content = open(os.path.join(folder, name), 'rb').read()\n        except OSError:\n            continue\n"
        "        print(os.path.join(folder, name), any(word.encode() in content for word in sys.argv[2:]))\n"
    )
    done = as_nobody(program, str(served.folder), "SECRETHO" + "OK", token)
    read = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())
    assert any(name.endswith("hello.py") for name in read), "the other user looks into the folder"
    hook = str(served.folder / "hook")  # the test's own file
    assert [name for name, holds in read.items() if holds == "True" and name != hook] == []


def test_another_user_of_the_machine_gets_nothing_and_runs_nothing(served: Served):
    program = (
        "import encodings.idna, json, os, sys, urllib.error, urllib.request\nos.setgroups([])\nos.setgid(65534)\nos.setuid(65534)\n"
        "for address in sys.argv[1:]:\n"
        "    data = b'{\"include_secrets\": true}' if address.endswith('filter') else None\n"
        "    asked = urllib.request.Request(address, data=data, headers={'Content-Type': 'application/json'})\n"
        "    try:\n        print(urllib.request.urlopen(asked, timeout=60).status)\n"
        "    except urllib.error.HTTPError as error:\n        print(error.code)\n"
    )
    done = as_nobody(program, *served.addresses)
    assert done.stdout.split() == ["401"] * len(served.addresses), done.stderr


def as_nobody(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    if os.getuid() != 0:
        pytest.skip("a second user: only root may become one")
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=120)


PAGE = """<!doctype html><title>evil</title><script>
async function tell(name, work) { try { return name + ': ' + await work() } catch (error) { return name + ': nothing' } }
async function attack(api, mlflow) {
  const post = (address, mode, type) => fetch(address, {method: 'POST', mode, credentials: 'include',
    headers: {'Content-Type': type}, body: JSON.stringify({include_secrets: true})}).then(a => a.text());
  return [
    await tell('read', () => post(api + '/block_documents/filter', 'cors', 'application/json')),
    await tell('simple', () => post(api + '/block_documents/filter', 'cors', 'text/plain')),
    await tell('flow', () => post(api + '/flows/', 'no-cors', 'text/plain')),
    await tell('mlflow', () => fetch(mlflow + '/ajax-api/2.0/mlflow/experiments/search?max_results=5', {credentials: 'include'}).then(a => a.text())),
    await tell('create', () => fetch(mlflow + '/ajax-api/2.0/mlflow/experiments/create', {method: 'POST', mode: 'no-cors',
      credentials: 'include', body: JSON.stringify({name: 'evil'})}).then(a => a.text())),
    await tell('socket', () => new Promise((yes, no) => { const s = new WebSocket(api.replace('http', 'ws') + '/events/out', 'prefect');
      s.onopen = () => yes('open'); s.onerror = no })),
  ].join('\\n');
}
</script>"""


@pytest.fixture
def page() -> Iterator[str]:
    """A page of another origin."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(PAGE.encode())

        def log_message(self, *arguments: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()


@pytest.mark.parametrize("signed_in", [False, True])
def test_a_page_in_a_real_browser_reads_nothing_and_changes_nothing(
    served: Served, page: str, signed_in: bool
):
    program = find_browser()
    if program is None:
        pytest.skip("a page in a real browser: no Chromium on the path")
    with Browser(program) as browser:
        browser.open(page, "evil")
        if signed_in:  # the browser of the person who served, which shows the password by itself
            browser.sign_in(served.secret)
        told = browser.evaluate(f"attack({json.dumps(served.prefect + '/api')}, {json.dumps(served.mlflow)})")
    assert [line.partition(": ")[0] for line in told.splitlines()] == [
        "read",
        "simple",
        "flow",
        "mlflow",
        "create",
        "socket",
    ]
    assert "SECRETHOOK" not in told
    assert "experiment_id" not in told
    assert "open" not in told
    known = httpx.get(
        f"{served.mlflow}/api/2.0/mlflow/experiments/search",
        params={"max_results": 50},
        auth=tuple(served.secret.split(":", 1)),
    )
    assert "evil" not in known.text
    flows = httpx.post(f"{served.prefect}/api/flows/filter", json={}, auth=tuple(served.secret.split(":", 1)))
    assert [flow["name"] for flow in flows.json()] == ["hello"]


def test_a_person_sees_both_pages_in_a_real_browser(served: Served):
    program = find_browser()
    if program is None:
        pytest.skip("both pages in a real browser: no Chromium on the path")
    with Browser(program) as browser:
        browser.open(served.prefect)
        browser.keep("prefect-password", base64.b64encode(served.secret.encode()).decode())
        browser.open(f"{served.prefect}/deployments", "hello", seconds=120)
        browser.sign_in(served.secret)
        browser.open(served.mlflow, "Experiments", seconds=120)


def test_the_secret_goes_to_no_server_but_the_projects_own(served: Served, tmp_path: Path):
    """A team's server, or whoever listens where ours did, is told what the environment says and nothing else."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        heard: list[bytes] = []

        def hear() -> None:
            while True:
                try:
                    link, _ = listening.accept()
                except OSError:
                    return
                with link:
                    heard.append(link.recv(65536))
                    link.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

        threading.Thread(target=hear, daemon=True).start()
        address = f"http://127.0.0.1:{listening.getsockname()[1]}/api"
        given = environment(
            CAMERA_HOME=str(served.folder / ".camera"),
            PYTHONPATH=str(REPOSITORY),
            PREFECT_API_URL=address,
            PREFECT_CLIENT_MAX_RETRIES="0",
        )
        subprocess.run(
            [sys.executable, "-m", "camera", "automations"],
            cwd=served.folder,
            env=given,
            capture_output=True,
            timeout=120,
        )
    said = b"".join(heard)
    assert said.startswith((b"GET", b"POST"))
    assert b"authorization" not in said.lower()
