"""DVC keeps the versions of what must outlive a machine, where there is a DVC repository."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from camera.errors import CameraError
from tasks import versioning
from tasks.versioning import Version
from tests.tasks.conftest import flip


def init(root: Path, remote: str | None) -> Path:
    from dvc.repo import Repo

    root.mkdir()
    with Repo.init(str(root), no_scm=True) as repo, repo.config.edit("repo") as config:
        config["core"] = {**config.get("core", {}), "analytics": False}
        if remote is not None:
            config["remote"]["box"] = {"url": remote}
            config["core"]["remote"] = "box"
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A DVC repository without git, whose default remote is a folder."""
    return init(tmp_path / "repository", str(tmp_path / "remote"))


def published(root: Path) -> Path:
    folder = root / "published" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def remote_files(root: Path) -> set[bytes]:
    return {path.read_bytes() for path in (root.parent / "remote").rglob("*") if path.is_file()}


def test_a_folder_is_versioned_and_pushed(root: Path) -> None:
    folder = published(root)
    version = versioning.add_and_push(folder, None)
    assert version is not None
    assert version.dvc_file == "published/tiny.dvc"
    assert version.md5.endswith(".dir")
    assert (version.pushed_to, version.push_error) == ("box", None)
    content = yaml.safe_load((root / version.dvc_file).read_text())
    assert content["outs"][0]["md5"] == version.md5
    assert content["outs"][0]["path"] == "tiny"
    assert {b"{}", b"weights"} <= remote_files(root)


def test_the_files_stay_where_they_are(root: Path) -> None:
    folder = published(root)
    versioning.add_and_push(folder, None)
    assert (folder / "model.safetensors").read_bytes() == b"weights"


def test_a_second_push_of_the_same_bytes_is_the_same_version(root: Path) -> None:
    folder = published(root)
    assert versioning.add_and_push(folder, None) == versioning.add_and_push(folder, None)


def test_other_bytes_are_another_version(root: Path) -> None:
    folder = published(root)
    first = versioning.add_and_push(folder, None)
    flip(folder / "model.safetensors")
    second = versioning.add_and_push(folder, None)
    assert first is not None
    assert second is not None
    assert second.md5 != first.md5
    assert b"weights" in remote_files(root)  # the earlier one is kept


def test_another_remote_can_be_named(root: Path, tmp_path: Path) -> None:
    from dvc.repo import Repo

    with Repo(str(root)) as repo, repo.config.edit("repo") as config:
        config["remote"]["shelf"] = {"url": str(tmp_path / "shelf")}
    version = versioning.add_and_push(published(root), "shelf")
    assert version is not None
    assert version.pushed_to == "shelf"
    assert not (tmp_path / "remote").exists()
    assert any((tmp_path / "shelf").rglob("*"))


def test_outside_a_repository_nothing_is_versioned(tmp_path: Path) -> None:
    folder = published(tmp_path)
    assert versioning.repository_root(folder) is None
    assert versioning.tracking_file(folder) is None
    assert versioning.tracked_version(folder) is None
    assert versioning.add_and_push(folder, None) is None
    assert not folder.with_name("tiny.dvc").exists()
    versioning.pull_if_tracked(folder / "missing")  # and nothing is asked of DVC


@pytest.mark.parametrize("trouble", ["unreachable", "unknown"])
def test_a_push_that_fails_leaves_a_version_that_says_so(tmp_path: Path, trouble: str) -> None:
    (tmp_path / "file").write_text("where the remote's folder should be")
    url = {"unreachable": str(tmp_path / "file" / "remote"), "unknown": str(tmp_path / "x")}
    root = init(tmp_path / "repository", url[trouble])
    version = versioning.add_and_push(published(root), "nobody" if trouble == "unknown" else None)
    assert version is not None
    assert version.pushed_to is None
    assert version.push_error
    assert (root / version.dvc_file).is_file()
    assert version.md5.endswith(".dir")


def test_without_a_remote_there_is_no_push_to_be_done(tmp_path: Path) -> None:
    root = init(tmp_path / "repository", None)
    version = versioning.add_and_push(published(root), None)
    assert version is not None
    assert (version.pushed_to, version.push_error) == (None, None)
    assert (root / version.dvc_file).is_file()


def test_a_push_can_be_made_up_for(tmp_path: Path) -> None:
    (tmp_path / "remote").write_text("in the way")
    root = init(tmp_path / "repository", str(tmp_path / "remote"))
    folder = published(root)
    first = versioning.add_and_push(folder, None)
    (tmp_path / "remote").unlink()
    second = versioning.add_and_push(folder, None)
    assert first is not None
    assert first.pushed_to is None
    assert second == Version("published/tiny.dvc", first.md5, "box")
    assert b"weights" in remote_files(root)


def test_what_a_path_is_tracked_by_is_found_from_inside_it(root: Path) -> None:
    folder = published(root)
    version = versioning.add_and_push(folder, None)
    assert version is not None
    expected = {"file": "published/tiny.dvc", "md5": version.md5}
    assert versioning.tracked_version(folder) == expected
    assert versioning.tracked_version(folder / "config.json") == expected
    assert versioning.tracked_version(folder / "not" / "here") == expected
    assert versioning.tracked_version(root / "published") is None
    assert versioning.tracked_version(root) is None


def test_a_single_file_can_be_tracked(root: Path) -> None:
    file = root / "story.txt"
    file.write_text("words")
    version = versioning.add_and_push(file, None)
    assert version is not None
    assert version.dvc_file == "story.txt.dvc"
    assert versioning.tracked_version(file) == {"file": "story.txt.dvc", "md5": version.md5}
    assert not version.md5.endswith(".dir")


def test_a_workspace_that_is_as_it_was_added_verifies(root: Path) -> None:
    folder = published(root)
    versioning.add_and_push(folder, None)
    assert versioning.verify(folder.with_name("tiny.dvc")) is None


@pytest.mark.parametrize("change", ["a bit", "a file less", "a file more", "all"])
def test_a_changed_workspace_is_noticed(root: Path, change: str) -> None:
    folder = published(root)
    versioning.add_and_push(folder, None)
    if change == "a bit":
        flip(folder / "model.safetensors")
    elif change == "a file less":
        (folder / "config.json").unlink()
    elif change == "a file more":
        (folder / "more.txt").write_text("x")
    else:
        folder.rename(root / "elsewhere")
    difference = versioning.verify(folder.with_name("tiny.dvc"))
    assert difference is not None
    assert difference.startswith("tiny.dvc: ")


@pytest.mark.parametrize("content", ["", "outs: []", "outs: [{}]", "outs: 3", "- a", "a: [", "outs: [x]"])
def test_a_dvc_file_that_cannot_be_read_is_named(root: Path, content: str) -> None:
    (root / "story.txt.dvc").write_text(content)
    with pytest.raises(CameraError, match=r"story\.txt\.dvc is not a \.dvc file that can be read"):
        versioning.tracked_version(root / "story.txt")


def test_a_dvc_file_without_its_repository_is_said_to_be_so(tmp_path: Path) -> None:
    (tmp_path / "tiny.dvc").write_text("outs:\n- md5: abc.dir\n  path: tiny\n")
    with pytest.raises(CameraError, match=r"tiny\.dvc .*DVC repository"):
        versioning.verify(tmp_path / "tiny.dvc")


def test_a_dvc_file_that_dvc_refuses_is_a_message(root: Path) -> None:
    (root / "tiny.dvc").write_text("outs: [")
    with pytest.raises(CameraError, match=r"tiny\.dvc"):
        versioning.verify(root / "tiny.dvc")


HOLDER = """
import sys, time, zc.lockfile
lock = zc.lockfile.LockFile(sys.argv[1])
print("held", flush=True)
time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def holding(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], None]]:
    """Have another process hold DVC's lock for so many seconds; DVC itself waits a moment instead of three seconds."""
    monkeypatch.setattr("dvc.lock.DEFAULT_TIMEOUT", 0.2)
    holders: list[subprocess.Popen[str]] = []

    def hold(seconds: float) -> None:
        (root / ".dvc" / "tmp").mkdir(exist_ok=True)
        command = [sys.executable, "-c", HOLDER, str(root / ".dvc" / "tmp" / "lock"), str(seconds)]
        holders.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert holders[-1].stdout is not None
        assert holders[-1].stdout.readline() == "held\n"

    yield hold
    for holder in holders:
        holder.kill()
        holder.wait()


def test_a_lock_that_another_process_holds_is_waited_for(
    root: Path, holding: Callable[[float], None], caplog: pytest.LogCaptureFixture
) -> None:
    folder = published(root)
    holding(1)
    version = versioning.add_and_push(folder, None)
    assert version is not None
    assert version.push_error is None
    assert [record.message for record in caplog.records if record.name == "camera.dvc"] == [
        f"waiting for another process that holds DVC's lock in {root}"
    ]
    holding(1)
    assert versioning.verify(folder.with_name("tiny.dvc")) is None


def test_a_lock_that_is_never_given_back_ends_in_words(
    root: Path, holding: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versioning, "_LOCKED_SECONDS", 0.3)
    folder = published(root)
    holding(60)
    with pytest.raises(versioning.DvcLockedError, match="was held by another process"):
        versioning.add_and_push(folder, None)


OF_A_FORGER = {
    "a pipe that it depends on": {"deps": [{"path": "pipe", "md5": "0" * 32}]},
    "an address": {"deps": [{"path": "x", "repo": {"url": "http://127.0.0.1:9/x.git"}}], "frozen": True},
    "a command": {"cmd": "touch forged"},
    "another working folder": {"wdir": ".."},
    "another folder": {"outs": [{"path": "copy"}]},
    "a path to another": {"outs": [{"path": "./copy"}]},
    "a folder on a server": {"outs": [{"fs_config": {"url": "http://127.0.0.1:9/"}}]},
    "two folders": {"outs": [{}, {"path": "copy"}]},
    "a list": {"outs": [["tiny"]]},
}


@pytest.mark.parametrize("what", OF_A_FORGER)
def test_a_dvc_file_that_asks_for_more_than_its_folder_is_not_given_to_dvc(root: Path, what: str) -> None:
    folder = published(root)
    versioning.add_and_push(folder, None)
    file = folder.with_name("tiny.dvc")
    assert versioning.verify(file) is None
    shutil.copytree(folder, folder.with_name("copy"))
    flip(folder / "config.json")
    os.mkfifo(folder.with_name("pipe"))
    content = yaml.safe_load(file.read_text())
    [out] = content["outs"]
    content |= OF_A_FORGER[what]
    content["outs"] = [{**out, **each} if isinstance(each, dict) else each for each in content["outs"]]
    file.write_text(yaml.safe_dump(content))
    started = time.monotonic()
    try:
        found = versioning.verify(file)
    except CameraError as error:
        found = str(error)
    assert found is not None
    assert "is not what `dvc add tiny` writes" in found or "not a .dvc file" in found
    assert time.monotonic() - started < 1, "nothing waits for a pipe or a server"


def test_a_dvc_file_of_aliases_or_without_end_is_refused_at_once(tmp_path: Path) -> None:
    lines = ["a: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"b{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    (tmp_path / "tiny.dvc").write_text("\n".join(lines))
    (tmp_path / "endless.dvc").touch()
    os.truncate(tmp_path / "endless.dvc", 1 << 40)
    for name in ("tiny.dvc", "endless.dvc"):
        with pytest.raises(CameraError, match=r"not a \.dvc file"):
            versioning.md5_of(tmp_path / name)


def test_a_loop_of_links_is_in_no_repository(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert versioning.repository_root(tmp_path / "loop") is None
    assert versioning.tracking_file(tmp_path / "loop") is None
