import os
from pathlib import Path

import pytest

from camera.errors import CameraError
from camera.files import link_or_copy, read_json, refuse_occupied, whole_file, whole_folder, write_json


class StoppedError(Exception):
    pass


def write_half(path: Path) -> None:
    path.write_text("half")
    raise StoppedError


def names(folder: Path) -> list[str]:
    """Everything below a folder, hidden names too."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_whole_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "x.txt"
    with whole_file(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
        assert temporary.parent == path.parent  # the same file system, so that the rename is atomic
    assert path.read_text() == "new"
    assert names(path.parent) == ["x.txt"]


def test_a_block_that_raises_leaves_no_file_and_no_temporary(tmp_path: Path) -> None:
    with pytest.raises(StoppedError), whole_file(tmp_path / "x.txt") as temporary:
        write_half(temporary)
    assert names(tmp_path) == []


def test_a_block_that_raises_leaves_the_old_file_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("old")
    with pytest.raises(StoppedError), whole_file(tmp_path / "x.txt") as temporary:
        write_half(temporary)
    assert (tmp_path / "x.txt").read_text() == "old"
    with whole_file(tmp_path / "x.txt") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "x.txt").read_text() == "new"
    assert names(tmp_path) == ["x.txt"]


def test_a_block_that_writes_nothing_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "x.txt"):
        pass
    assert names(tmp_path) == []


@pytest.mark.parametrize("exists", [False, True])
def test_a_whole_folder_appears_when_the_block_ends(tmp_path: Path, exists: bool) -> None:
    path = tmp_path / "out"
    if exists:
        path.mkdir()
    with whole_folder(path) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a").write_text("a")
        assert temporary.parent == tmp_path
        assert not names(path) if exists else not path.exists()
    assert names(tmp_path) == ["out", "out/sub", "out/sub/a"]


def test_a_block_that_raises_leaves_no_folder_and_no_temporary(tmp_path: Path) -> None:
    with pytest.raises(StoppedError), whole_folder(tmp_path / "out") as temporary:
        write_half(temporary / "a")
    assert names(tmp_path) == []


def test_what_a_killed_process_of_the_same_number_left_is_swept_away(tmp_path: Path) -> None:
    with pytest.raises(StoppedError), whole_folder(tmp_path / "out") as temporary:
        raise StoppedError
    temporary.mkdir()
    (temporary / "stale").write_text("of a killed process")
    with whole_folder(tmp_path / "out") as again:
        assert again == temporary
        (again / "a").write_text("a")
    assert names(tmp_path / "out") == ["a"]


@pytest.mark.parametrize("occupied", ["file", "folder"])
def test_an_occupied_output_is_refused_and_left_alone(tmp_path: Path, occupied: str) -> None:
    path = tmp_path / "out"
    if occupied == "file":
        path.write_text("mine")
    else:
        path.mkdir()
        (path / "mine").write_text("mine")
    before = names(tmp_path)
    with pytest.raises(CameraError, match=f"{path} already exists and is not empty"):
        refuse_occupied(path)
    with pytest.raises(CameraError, match=f"{path} already exists"), whole_folder(path):
        pytest.fail("the block ran")
    assert names(tmp_path) == before


def test_an_empty_or_absent_output_is_free(tmp_path: Path) -> None:
    refuse_occupied(tmp_path / "absent")
    refuse_occupied(tmp_path)


def test_json_reads_back_as_it_was_written_and_ends_in_a_newline(tmp_path: Path) -> None:
    value = {"β": [1, 2.5, None, True], "a": {"b": "系统"}}
    write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert text.endswith("}\n")
    assert "系统" in text
    assert read_json(tmp_path / "x.json") == value
    assert names(tmp_path) == ["x.json"]


def test_a_number_that_json_lacks_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert names(tmp_path) == []


def test_json_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with pytest.raises(CameraError, match=r"x\.json is missing"):
        read_json(path)
    for data in (b"", b"{", b"\xff\xfe\xfa", b"[" * 100_000):
        path.write_bytes(data)
        with pytest.raises(CameraError, match=r"x\.json is not valid JSON"):
            read_json(path)
    with pytest.raises(CameraError, match=f"{tmp_path} cannot be read"):
        read_json(tmp_path)


def test_a_link_or_copy_holds_the_bytes_of_its_source(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"bytes")
    link_or_copy(tmp_path / "a", tmp_path / "deep" / "b")
    assert (tmp_path / "deep" / "b").read_bytes() == b"bytes"
    assert os.path.samefile(tmp_path / "a", tmp_path / "deep" / "b")


def test_a_symbolic_link_is_followed_as_hub_caches_need(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "blobs" / "x").write_bytes(b"bytes")
    (tmp_path / "snapshot" / "file").symlink_to("../blobs/x")
    target = tmp_path / "far" / "away" / "file"
    link_or_copy(tmp_path / "snapshot" / "file", target)
    assert not target.is_symlink()
    assert target.read_bytes() == b"bytes"


def test_where_links_are_impossible_the_bytes_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError("cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "a").write_bytes(b"bytes")
    link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"bytes"
    assert not os.path.samefile(tmp_path / "a", tmp_path / "b")
