"""Files that a killed run left are used only as it wrote them."""

from pathlib import Path

import pytest

from camera.layerwise.parts import Parts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    parts = Parts(tmp_path)
    parts.begin()
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
        parts.add(name)
    return tmp_path


def test_what_was_left_alone_is_whole(folder: Path) -> None:
    parts = Parts(folder)
    assert parts.are_whole()
    (folder / "three").write_text("three")
    parts.add("three")
    assert Parts(folder).are_whole()


@pytest.mark.parametrize("damage", ["changed", "gone", "no record", "no JSON", "another digest", "a list"])
def test_what_was_changed_is_not(folder: Path, damage: str) -> None:
    record = folder / "parts.json"
    if damage == "changed":
        (folder / "one").write_text("onf")
    elif damage == "gone":
        (folder / "one").unlink()
    elif damage == "no record":
        record.unlink()
    elif damage == "another digest":
        record.write_text(record.read_text().replace('"two"', '"tow"'))
    else:
        record.write_text("[]" if damage == "a list" else "{")
    assert not Parts(folder).are_whole()
