"""Artifacts are whole and verified, or they do not exist."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from camera.digests import digest_json
from camera.files import atomic_file, read_json
from tasks.store import LINEAGE, MANIFEST, Artifact, Store
from tests.conftest import REPOSITORY
from tests.tasks.conftest import flip

KEY = "0123456789abcdef"
LINE: dict[str, Any] = {"schema": 1, "sources": {}, "stages": {}}


class StoppedError(Exception):
    pass


def fill(folder: Path) -> dict[str, float]:
    (folder / "a.bin").write_bytes(b"some bytes")
    (folder / "sub").mkdir(exist_ok=True)
    (folder / "sub" / "b.txt").write_text("text")
    return {"loss": 1.5}


def make(
    store: Store,
    fill: Callable[[Path], dict[str, float]] = fill,
    key: str = KEY,
    resumes: bool = False,
    lineage: dict[str, Any] = LINE,
) -> Artifact:
    with store.lock(key):
        return store.make("stage", key, fill, {"version": 1}, lineage, resumes=resumes)


def child(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A Python process of its own that runs `code` on the store."""
    prelude = (
        "import os, signal, sys, time\nfrom pathlib import Path\nfrom tasks.store import Store\n"
        "store = Store(Path(sys.argv[1]))\n"
    )
    command = [sys.executable, "-c", prelude + code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_made_is_found(store: Store) -> None:
    made = make(store)
    found = store.find("stage", KEY)
    assert found == made
    assert found is not None
    assert found.path == store.path("stage", KEY)
    assert (found.stage, found.key) == ("stage", KEY)
    assert found.metrics == {"loss": 1.5}
    assert found.size_bytes == len(b"some bytes") + len("text")
    assert (found.path / "sub" / "b.txt").read_text() == "text"
    assert found.read_lineage() == LINE


def test_what_was_never_made_is_not_found(store: Store) -> None:
    make(store)
    assert store.find("stage", "another key") is None
    assert store.find("another stage", KEY) is None
    assert store.damage("stage", "another key") is None


def test_the_manifest_lists_size_and_sha256_of_every_file(store: Store) -> None:
    manifest = make(store).manifest
    assert set(manifest["files"]) == {"a.bin", "sub/b.txt"}
    assert manifest["files"]["a.bin"] == {
        "size": 10,
        "sha256": hashlib.sha256(b"some bytes").hexdigest(),
    }


def test_the_digest_is_of_names_and_bytes_and_of_nothing_else(store: Store) -> None:
    first = make(store)
    hashes = {name: entry["sha256"] for name, entry in first.manifest["files"].items()}
    assert first.digest == digest_json(hashes)

    def slowly(folder: Path) -> dict[str, float]:
        time.sleep(0.01)
        return {**fill(folder), "another metric": 2.0}

    second = make(store, slowly, "another key", lineage={**LINE, "sources": {"x": {}}})
    assert second.digest == first.digest
    assert second.manifest["metrics"] != first.manifest["metrics"]


@pytest.mark.parametrize("change", ["name", "bytes"])
def test_another_name_or_another_byte_is_another_digest(store: Store, change: str) -> None:
    def other(folder: Path) -> dict[str, float]:
        fill(folder)
        if change == "name":
            (folder / "a.bin").rename(folder / "A.bin")
        else:
            (folder / "a.bin").write_bytes(b"some bytez")
        return {}

    assert make(store, other, "another key").digest != make(store).digest


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a flipped bit": (lambda path: flip(path / "a.bin", 3), "a.bin does not have the sha256"),
    "a truncated file": (lambda path: truncate(path / "a.bin", 4), "a.bin does not have the sha256"),
    "an emptied file": (lambda path: truncate(path / "a.bin", 0), "a.bin does not have the sha256"),
    "a missing file": (lambda path: (path / "sub" / "b.txt").unlink(), "sub/b.txt is missing"),
    "an extra file": (lambda path: (path / "c").write_text(""), "c is not part of the artifact"),
    "a hidden extra file": (lambda path: (path / ".c").write_text(""), "c is not part of the artifact"),
    "no manifest": (lambda path: (path / MANIFEST).unlink(), "manifest.json is missing"),
    "half a manifest": (lambda path: truncate(path / MANIFEST, 40), "manifest.json is not valid JSON"),
    "another format": (lambda path: edit(path, format=2), "is of another format or key"),
    "another key": (lambda path: edit(path, key="x"), "is of another format or key"),
    "another stage": (lambda path: edit(path, stage="x"), "is of another format or key"),
    "another digest": (lambda path: edit(path, digest="x"), "manifest.json"),
    "other metrics": (lambda path: edit(path, metrics={"loss": 0.5}), "manifest.json"),
    "other options": (lambda path: edit(path, version=7), "manifest.json"),
    "a manifest that is a list": (lambda path: rewrite(path / MANIFEST, "[]"), "manifest.json"),
    "a manifest without files": (lambda path: edit(path, files=None), "manifest.json"),
    "no lineage": (lambda path: (path / LINEAGE).unlink(), "lineage.json is missing"),
    "another lineage": (lambda path: flip(path / LINEAGE, 5), "lineage.json"),
}


def truncate(path: Path, size: int) -> None:
    path.chmod(0o644)
    os.truncate(path, size)


def rewrite(path: Path, content: str) -> None:
    path.chmod(0o644)
    path.write_text(content)


def edit(path: Path, **fields: object) -> None:
    rewrite(path / MANIFEST, json.dumps({**read_json(path / MANIFEST), **fields}))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_noticed_and_named_and_made_good(store: Store, damage: str) -> None:
    made = make(store)
    spoil, words = DAMAGES[damage]
    spoil(made.path)
    assert store.find("stage", KEY) is None
    found = store.damage("stage", KEY)
    assert found is not None
    assert words in found
    again = make(store)
    assert again.digest == made.digest
    assert store.find("stage", KEY) == again


def test_no_flipped_bit_of_a_manifest_goes_unnoticed_or_stops_the_run(store: Store) -> None:
    path = make(store).path / MANIFEST
    good = path.read_bytes()
    path.chmod(0o644)
    for at in range(len(good)):
        for bit in (1, 32):
            bad = bytearray(good)
            bad[at] ^= bit
            path.write_bytes(bad)
            if json_or_none(bytes(bad)) == json.loads(good):
                continue  # white space
            assert store.find("stage", KEY) is None, (at, bad[max(at - 20, 0) : at + 20])


def json_or_none(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return None


def test_an_artifact_is_read_only(store: Store) -> None:
    path = make(store).path
    assert {file.stat().st_mode & 0o777 for file in path.rglob("*") if file.is_file()} == {0o444}


def test_a_folder_at_work_is_no_artifact(store: Store) -> None:
    seen: list[Artifact | None] = []

    def look(folder: Path) -> dict[str, float]:
        fill(folder)
        seen.append(store.find("stage", KEY))
        assert not store.path("stage", KEY).exists()
        return {}

    made = make(store, look)
    assert seen == [None]
    assert names(made.path.parent) == [KEY]


def test_a_fill_that_fails_leaves_nothing_under_the_key(store: Store) -> None:
    def half(folder: Path) -> dict[str, float]:
        fill(folder)
        raise StoppedError

    with pytest.raises(StoppedError):
        make(store, half)
    assert not store.path("stage", KEY).exists()
    assert store.find("stage", KEY) is None
    assert make(store).digest == make(store, key="another key").digest  # of the half, nothing is left


def test_a_metric_that_json_lacks_leaves_nothing_under_the_key(store: Store) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        make(store, lambda folder: {**fill(folder), "loss": float("nan")})
    assert not store.path("stage", KEY).exists()
    assert make(store).metrics == {"loss": 1.5}


@pytest.mark.parametrize("resumes", [True, False])
def test_only_a_stage_that_resumes_sees_what_a_killed_one_left(store: Store, resumes: bool) -> None:
    def killed(folder: Path) -> dict[str, float]:
        (folder / "layer-0").write_text("done")
        raise StoppedError

    seen: list[list[str]] = []

    def again(folder: Path) -> dict[str, float]:
        seen.append(names(folder))
        (folder / "layer-0").write_text("done")
        (folder / "layer-1").write_text("done")
        return {}

    with pytest.raises(StoppedError):
        make(store, killed, resumes=resumes)
    made = make(store, again, resumes=resumes)
    assert seen == [["layer-0"] if resumes else []]
    assert set(made.manifest["files"]) == {"layer-0", "layer-1"}


def test_a_damaged_artifact_is_made_anew_from_nothing(store: Store) -> None:
    flip(make(store, resumes=True).path / "a.bin")
    seen: list[list[str]] = []

    def look(folder: Path) -> dict[str, float]:
        seen.append(names(folder))
        return fill(folder)

    make(store, look, resumes=True)
    assert seen == [[]]


def test_a_file_that_a_kill_left_half_written_does_not_enter_a_resumed_artifact(store: Store) -> None:
    code = (
        "from camera.files import atomic_file\n"
        "def fill(folder):\n"
        "    (folder / 'a.bin').write_bytes(b'some bytes')\n"
        "    with atomic_file(folder / 'sub' / 'b.txt') as temporary:\n"
        "        temporary.write_text('te')\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "with store.lock(sys.argv[2]):\n"
        "    store.make('stage', sys.argv[2], fill, {'version': 1}, {}, resumes=True)\n"
    )
    assert child(code, store.root, KEY).wait(timeout=60) == -signal.SIGKILL

    def resume(folder: Path) -> dict[str, float]:
        assert (folder / "a.bin").is_file()
        with atomic_file(folder / "sub" / "b.txt") as temporary:
            temporary.write_text("text")
        return {"loss": 1.5}

    assert make(store, resume, resumes=True).digest == make(store, key="another key").digest


@pytest.mark.parametrize("resumes", [True, False])
def test_a_kill_between_writing_and_renaming_leaves_no_artifact(store: Store, resumes: bool) -> None:
    code = (
        "import tasks.store\n"
        "tasks.store.os.rename = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)\n"
        "def fill(folder):\n"
        "    (folder / 'a.bin').write_bytes(b'some bytes')\n"
        "    (folder / 'sub').mkdir()\n"
        "    (folder / 'sub' / 'b.txt').write_text('text')\n"
        "    return {'loss': 1.5}\n"
        "with store.lock(sys.argv[2]):\n"
        f"    store.make('stage', sys.argv[2], fill, {{'version': 1}}, {{}}, resumes={resumes})\n"
    )
    assert child(code, store.root, KEY).wait(timeout=60) == -signal.SIGKILL
    assert (store.path("stage", f".{KEY}.working") / MANIFEST).is_file()  # it was that late
    assert store.find("stage", KEY) is None

    def again(folder: Path) -> dict[str, float]:
        with atomic_file(folder / "a.bin") as temporary:
            temporary.write_bytes(b"some bytes")
        with atomic_file(folder / "sub" / "b.txt") as temporary:
            temporary.write_text("text")
        return {"loss": 1.5}

    made = make(store, again, resumes=resumes)
    assert store.find("stage", KEY) == made
    assert made.digest == make(store, key="another key").digest
    assert names(made.path.parent) == sorted([KEY, "another key"])


def test_of_two_processes_that_want_a_key_one_works_and_the_other_waits(store: Store, tmp_path: Path) -> None:
    code = (
        "def fill(folder):\n"
        "    print('working', flush=True)\n"
        "    while not Path(sys.argv[3]).exists():\n"
        "        time.sleep(0.01)\n"
        "    (folder / 'pid').write_text(str(os.getpid()))\n"
        "    return {}\n"
        "with store.lock(sys.argv[2], lambda: print('waiting', flush=True)):\n"
        "    found = store.find('stage', sys.argv[2])\n"
        "    if found is None:\n"
        "        found = store.make('stage', sys.argv[2], fill, {'version': 1}, {}, resumes=False)\n"
        "print((found.path / 'pid').read_text())\n"
    )
    go = tmp_path / "go"
    first = child(code, store.root, KEY, go)
    assert line_of(first) == "working"
    second = child(code, store.root, KEY, go)
    assert line_of(second) == "waiting"
    go.touch()
    assert (line_of(first), line_of(second)) == (str(first.pid), str(first.pid))
    assert (first.wait(timeout=30), second.wait(timeout=30)) == (0, 0)


def test_a_lock_is_free_again_when_its_holder_is_killed(store: Store) -> None:
    code = "with store.lock(sys.argv[2]):\n    print('held', flush=True)\n    time.sleep(600)\n"
    holder = child(code, store.root, KEY)
    assert line_of(holder) == "held"
    waited: list[str] = []

    def kill() -> None:
        waited.append("waited")
        holder.kill()

    with store.lock(KEY, kill):
        pass
    assert waited == ["waited"]
    assert holder.wait(timeout=30) == -signal.SIGKILL


def test_threads_wait_for_each_other_too(store: Store) -> None:
    inside: list[int] = []
    most: list[int] = []

    def work(number: int) -> None:
        with store.lock(KEY):
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.01)
            inside.remove(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert most == [1] * 6


def test_other_keys_are_not_held_up(store: Store) -> None:
    with store.lock(KEY), store.lock("another key", lambda: pytest.fail("had to wait")):
        pass
