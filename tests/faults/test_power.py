"""A power cut at every file operation of everything that puts a file or folder in its place."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from camera.files import atomic_file, atomic_folder
from tasks.store import Store
from tests.faults.conftest import ended, start
from tests.faults.deaths import Deaths

pytestmark = pytest.mark.faults

KEY = "0123456789abcdef"
LINEAGE = {"schema": 1, "sources": {}, "stages": {}}


def new_file(folder: Path) -> None:
    with atomic_file(folder / "place" / "x.txt") as temporary:
        temporary.write_text("new " * 1000)


def new_folder(folder: Path) -> None:
    if not (folder / "place" / "out").exists():  # what is there is never overwritten
        with atomic_folder(folder / "place" / "out") as temporary:
            fill(temporary)


def fill(folder: Path) -> dict[str, float]:
    (folder / "a.bin").write_bytes(b"some bytes" * 100)
    (folder / "sub").mkdir(exist_ok=True)
    (folder / "sub" / "b.txt").write_text("text " * 100)
    return {}


def new_artifact(folder: Path) -> None:
    store = Store(folder / "place")
    with store.lock(KEY):
        if store.find("stage", KEY) is None:
            store.make("stage", KEY, fill, {"version": 1}, LINEAGE, resumes=True)


def eviction(folder: Path) -> None:
    store = Store(folder / "place")
    with store.lock(KEY):
        if store.find("stage", KEY) is not None:
            store.evict("stage", KEY)


def act_and_die(act: Callable[[Path], None], folder: Path, last: int | None, power: bool) -> None:
    deaths = Deaths((folder / "place",), power, last=last).watch()
    act(folder)
    (folder / "count").write_text(str(deaths.count))


def operations(act: Callable[[Path], None], folder: Path, before: Callable[[Path], None]) -> int:
    before(folder)
    assert ended(start(act_and_die, act, folder, None, False)) == 0
    return int((folder / "count").read_text())


def every_death(
    act: Callable[[Path], None], before: Callable[[Path], None], holds: Callable[[Path], None], tmp_path: Path
) -> None:
    """End an act at each of its operations; what is left must hold, and the act done again must end well."""
    (tmp_path / "whole").mkdir()
    total = operations(act, tmp_path / "whole", before)
    assert total >= 4
    for last in range(1, total + 1):
        for power in (False, True):
            folder = tmp_path / f"{last}-{power}"
            folder.mkdir()
            before(folder)
            assert ended(start(act_and_die, act, folder, last, power)) == -9
            holds(folder)
            act(folder)
            assert content(folder / "place") == content(tmp_path / "whole" / "place"), (last, power)


def content(folder: Path) -> dict[str, bytes]:
    """All files that are not locks or what dead processes left and will be swept; manifests hold the time."""
    return {
        path.relative_to(folder).as_posix(): b"" if path.name == "manifest.json" else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


def test_a_file_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    def old_file(folder: Path) -> None:
        (folder / "place").mkdir()
        (folder / "place" / "x.txt").write_text("old")
        os.sync()

    def old_or_new(folder: Path) -> None:
        assert (folder / "place" / "x.txt").read_text() in ("old", "new " * 1000)

    every_death(new_file, old_file, old_or_new, tmp_path)


def test_a_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    def nothing(folder: Path) -> None:
        (folder / "place").mkdir()

    def whole_or_absent(folder: Path) -> None:
        if (folder / "place" / "out").exists():
            assert content(folder / "place" / "out") == {
                "a.bin": b"some bytes" * 100,
                "sub/b.txt": b"text " * 100,
            }

    every_death(new_folder, nothing, whole_or_absent, tmp_path)


@pytest.mark.parametrize("damaged", [False, True], ids=["new", "in place of a damaged one"])
def test_an_artifact_is_whole_or_not_there(tmp_path: Path, damaged: bool) -> None:
    def damaged_or_nothing(folder: Path) -> None:
        (folder / "place").mkdir()
        if damaged:
            new_artifact(folder)
            file = folder / "place" / "stage" / KEY / "a.bin"
            file.chmod(0o644)
            file.write_bytes(b"other bytes")

    def whole_or_unknown(folder: Path) -> None:
        store = Store(folder / "place")
        found = store.find("stage", KEY)
        assert found is None or store.damage("stage", KEY) is None
        assert damaged or found is not None or not store.path("stage", KEY).exists()

    every_death(new_artifact, damaged_or_nothing, whole_or_unknown, tmp_path)


def test_an_artifact_that_is_evicted_is_whole_or_evicted(tmp_path: Path) -> None:
    def made(folder: Path) -> None:
        (folder / "place").mkdir()
        new_artifact(folder)

    def whole_or_evicted(folder: Path) -> None:
        store = Store(folder / "place")
        assert store.find("stage", KEY) is not None or store.evicted("stage", KEY) is not None

    every_death(eviction, made, whole_or_evicted, tmp_path)
