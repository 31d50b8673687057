"""What a project sets for the tools that it stands on."""

import os
import stat
import urllib.request
from pathlib import Path

import pytest

from camera.disk import explain_disk_errors
from camera.errors import CameraError
from tasks.lease import eviction_lock, lease
from tasks.project import exempt_loopback, share
from tasks.store import Store

PROXY = "http://proxy.example:3128"


@pytest.mark.parametrize(
    ("given", "exempt"),
    [
        ({}, "127.0.0.1,localhost,::1"),
        ({"no_proxy": "", "NO_PROXY": ""}, "127.0.0.1,localhost,::1"),
        ({"NO_PROXY": ".intern.example, localhost"}, ".intern.example,localhost,127.0.0.1,::1"),
        ({"no_proxy": "*"}, "*"),
    ],
)
@pytest.mark.parametrize("name", ["http_proxy", "HTTPS_PROXY"])
def test_no_proxy_is_asked_for_what_runs_on_this_machine(
    given: dict[str, str], exempt: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {name: PROXY, **given}
    exempt_loopback(environment)
    assert environment["no_proxy"] == environment["NO_PROXY"] == exempt
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert all(map(urllib.request.proxy_bypass, ("127.0.0.1:4200", "localhost:5000")))


def test_without_a_proxy_nothing_is_set() -> None:
    environment: dict[str, str] = {"no_proxy": "a"}
    exempt_loopback(environment)
    assert environment == {"no_proxy": "a"}


def test_a_folder_that_its_group_may_write_is_shared_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        for rights, made in {0o700: 0o600, 0o755: 0o600, 0o2775: 0o660, 0o777: 0o666}.items():
            os.umask(0o077)
            (home := tmp_path / f"{rights:o}").mkdir()
            home.chmod(rights)
            share(home)
            (home / "file").touch()
            assert stat.S_IMODE((home / "file").stat().st_mode) == made
    finally:
        os.umask(before)


@pytest.mark.skipif(os.getuid() != 0, reason="needs a second user")
@pytest.mark.parametrize(("rights", "may"), [(0o2777, True), (0o755, False)])
def test_another_user_locks_and_collects_what_the_folder_lets_and_is_told_else(
    tmp_path: Path, rights: int, may: bool
) -> None:
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(0o755)
    (home := tmp_path / "home").mkdir()
    home.chmod(rights)
    store = Store(home / "store")
    said = tmp_path / "said"
    said.touch()
    said.chmod(0o666)

    def work(uid: int) -> None:
        if (child := os.fork()) == 0:
            try:
                os.umask(0o077)
                os.setgid(uid)
                os.setuid(uid)
                share(home)
                with explain_disk_errors(store.root), store.lock("key"), lease(store) as in_use:
                    in_use("key")
                with explain_disk_errors(store.root), eviction_lock(store):
                    said.write_text("done")
            except CameraError as error:
                said.write_text(str(error))
            except BaseException as error:
                said.write_text(repr(error))
            finally:
                os._exit(0)
        os.waitpid(child, 0)

    umask = os.umask(0o077)
    try:
        share(home)
        with store.lock("key"), lease(store) as in_use:
            in_use("key")
    finally:
        os.umask(umask)
    work(12345)
    if may:
        assert said.read_text() == "done"
    else:
        assert "cannot be written (Permission denied)" in said.read_text()
