"""The guard before the servers of `camera serve`, and the secret that it asks for."""

import asyncio
import os
from pathlib import Path
from typing import Any

import httpx
import pytest

from camera.errors import CameraError
from flows.guard import Guard
from flows.secret import know_own_servers, project_secret, secret_file
from flows.services import Service, Services
from tasks.project import Project

SECRET = "camera:right"
OURS = "http://127.0.0.1:5000"


async def answering(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"X-Frame-Options", b"ALLOWALL")]})
    await send({"type": "http.response.body", "body": b"an answer"})


def ask(secret: str | None, path: str = "/", method: str = "GET", **headers: str) -> httpx.Response:
    async def asked() -> httpx.Response:
        transport = httpx.ASGITransport(Guard(answering, secret, ("/health",)))
        async with httpx.AsyncClient(transport=transport, base_url=OURS) as client:
            password = {} if secret is None or "Authorization" in headers else {"auth": ("camera", "right")}
            return await client.request(method, path, headers=headers, **password)

    return asyncio.run(asked())


@pytest.mark.parametrize(
    "host", ["127.0.0.1:5000", "localhost:14200", "[::1]:5000", "LOCALHOST", "127.0.0.1"]
)
def test_a_loopback_host_is_answered_through_whatever_port(host: str):
    assert ask(SECRET, Host=host).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "127.0.0.1.evil.example",
        "evil@127.0.0.1",
        "127.0.0.2",
        "0.0.0.0",
        "[::ffff:1.2.3.4]",
        "localhost:x",
        "",
    ],
)
def test_another_host_is_refused(host: str):
    assert ask(SECRET, Host=host).status_code == 403
    assert ask(None, "/health", Host=host).status_code == 403


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": OURS}, 200),
        ({"Origin": "http://localhost:5000"}, 403),
        ({"Origin": "http://127.0.0.1:5001"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
        ({"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}, 200),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"}, 403),
    ],
)
def test_a_page_of_another_origin_is_refused_and_a_link_to_ours_is_followed(
    headers: dict[str, str], status: int
):
    assert ask(SECRET, **headers).status_code == status


def test_a_form_of_another_page_that_navigates_is_refused():
    navigated = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert ask(SECRET, method="POST", **navigated).status_code == 403


def test_without_the_secret_only_the_servers_health_is_told():
    assert ask(SECRET, Authorization="Basic Y2FtZXJhOndyb25n").status_code == 401
    assert ask(SECRET, Authorization="").headers["www-authenticate"].startswith("Basic")
    assert ask(SECRET, "/health", Authorization="").status_code == 200
    assert ask(SECRET, "/health/x", Authorization="").status_code == 401


def test_no_page_shows_ours_inside_itself():
    assert ask(SECRET).headers.get_list("x-frame-options") == ["DENY"]


def test_the_secret_is_made_once_and_only_its_owner_reads_it(tmp_path: Path):
    made = project_secret(tmp_path)
    assert made == project_secret(tmp_path)
    assert made.startswith("camera:")
    assert len(made) > 40
    assert secret_file(tmp_path).stat().st_mode & 0o777 == 0o600
    assert secret_file(tmp_path).parent.stat().st_mode & 0o777 == 0o700
    assert made != project_secret(tmp_path / "another")


def test_a_second_user_of_a_project_has_a_secret_and_services_of_their_own(tmp_path: Path):
    if os.getuid() != 0:
        pytest.skip("a second user: only root may make a folder another's")
    project_secret(tmp_path)
    theirs = secret_file(tmp_path)
    os.chown(theirs.parent, 65534, 65534)
    made = project_secret(tmp_path)
    assert secret_file(tmp_path) == tmp_path / "serve-0" / "secret"
    assert made != theirs.read_text().strip()
    with Services(tmp_path).exclusive():
        assert Services(tmp_path).known() == {}
    assert os.listdir(theirs.parent) == ["secret"]


def test_a_secret_that_others_can_read_is_none(tmp_path: Path):
    project_secret(tmp_path)
    secret_file(tmp_path).chmod(0o644)
    with pytest.raises(CameraError, match="can be read by others"):
        project_secret(tmp_path)
    secret_file(tmp_path).unlink()
    (tmp_path / "elsewhere").write_text(SECRET)
    secret_file(tmp_path).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CameraError, match="is not yours"):
        project_secret(tmp_path)


@pytest.fixture
def serving(tmp_path: Path) -> Project:
    """A project whose record says that this very process is its Prefect server and its MLflow."""
    from camera.processes import start_of

    services = Services(tmp_path)
    services.folder.mkdir(parents=True)
    born = start_of(os.getpid())
    assert born is not None
    urls = {"prefect": "http://127.0.0.1:4200/api", "mlflow": OURS}
    services._write(
        {name: Service(name, os.getpid(), born, "mark", "log", url) for name, url in urls.items()}
    )
    return Project(tmp_path)


def test_clients_of_the_projects_own_servers_show_the_secret(serving: Project):
    environment = {"PREFECT_API_URL": "http://127.0.0.1:4200/api", "MLFLOW_TRACKING_URI": OURS}
    know_own_servers(serving, environment)
    secret = project_secret(serving.home)
    assert environment["PREFECT_API_AUTH_STRING"] == secret
    assert f"{environment['MLFLOW_TRACKING_USERNAME']}:{environment['MLFLOW_TRACKING_PASSWORD']}" == secret


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {
            "PREFECT_API_URL": "https://prefect.example.org/api",
            "MLFLOW_TRACKING_URI": "https://mlflow.example.org",
        },
        {"PREFECT_API_URL": "http://127.0.0.1:4201/api"},
        {"PREFECT_API_URL": "http://localhost:4200/api"},
        {"PREFECT_API_URL": "http://127.0.0.1:4200/api", "PREFECT_API_KEY": "theirs"},
        {"PREFECT_API_URL": "http://127.0.0.1:4200/api", "PREFECT_API_AUTH_STRING": "theirs"},
        {"MLFLOW_TRACKING_URI": OURS, "MLFLOW_TRACKING_TOKEN": "theirs"},
    ],
)
def test_the_secret_goes_to_no_other_server_and_replaces_nothing(
    serving: Project, environment: dict[str, str]
):
    before = dict(environment)
    know_own_servers(serving, environment)
    assert environment == before


def test_the_secret_does_not_go_to_who_listens_where_a_dead_server_did(serving: Project):
    services = Services(serving.home)
    dead = {
        name: Service(name, os.getpid(), "another time", "m", "log", s.url)
        for name, s in services.known().items()
    }
    services._write(dead)
    environment = {"PREFECT_API_URL": "http://127.0.0.1:4200/api"}
    know_own_servers(serving, environment)
    assert "PREFECT_API_AUTH_STRING" not in environment


def test_prefects_folder_is_looked_into_by_its_owner_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "environ", {**os.environ})
    monkeypatch.delenv("PREFECT_HOME", raising=False)
    (tmp_path / "prefect").mkdir(mode=0o755)
    project = Project(tmp_path)
    project.configure()
    assert project.prefect_home.stat().st_mode & 0o777 == 0o700
