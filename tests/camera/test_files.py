import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from camera import files
from camera.errors import CameraError
from camera.files import atomic_file, atomic_folder, copy_bytes, read_json, refuse_occupied, write_json


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
    with atomic_file(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
        assert temporary.parent == path.parent  # the same file system, so that the rename is atomic
    assert path.read_text() == "new"
    assert names(path.parent) == ["x.txt"]


def test_a_block_that_raises_leaves_no_file_and_no_temporary(tmp_path: Path) -> None:
    with pytest.raises(StoppedError), atomic_file(tmp_path / "x.txt") as temporary:
        write_half(temporary)
    assert names(tmp_path) == []


def test_a_block_that_raises_leaves_the_old_file_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("old")
    with pytest.raises(StoppedError), atomic_file(tmp_path / "x.txt") as temporary:
        write_half(temporary)
    assert (tmp_path / "x.txt").read_text() == "old"
    with atomic_file(tmp_path / "x.txt") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "x.txt").read_text() == "new"
    assert names(tmp_path) == ["x.txt"]


def test_a_block_that_writes_nothing_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "x.txt"):
        pass
    assert names(tmp_path) == []


@pytest.mark.parametrize("exists", [False, True])
def test_a_whole_folder_appears_when_the_block_ends(tmp_path: Path, exists: bool) -> None:
    path = tmp_path / "out"
    if exists:
        path.mkdir()
    with atomic_folder(path) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a").write_text("a")
        assert temporary.parent == tmp_path
        assert not names(path) if exists else not path.exists()
    assert names(tmp_path) == ["out", "out/sub", "out/sub/a"]


def test_a_block_that_raises_leaves_no_folder_and_no_temporary(tmp_path: Path) -> None:
    with pytest.raises(StoppedError), atomic_folder(tmp_path / "out") as temporary:
        write_half(temporary / "a")
    assert names(tmp_path) == []


def test_what_a_killed_process_of_the_same_number_left_is_swept_away(tmp_path: Path) -> None:
    with pytest.raises(StoppedError), atomic_folder(tmp_path / "out") as temporary:
        raise StoppedError
    temporary.mkdir()
    (temporary / "stale").write_text("of a killed process")
    with atomic_folder(tmp_path / "out") as again:
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
    with pytest.raises(CameraError, match=f"{path} already exists"), atomic_folder(path):
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
    for data in (b"", b"{", b"\xff\xfe\xfa", b"[" * 100_000, b"9" * 5000, b"[" + b"0," * 9_000_000 + b"0]"):
        path.write_bytes(data)
        with pytest.raises(CameraError, match=r"x\.json is not valid JSON"):
            read_json(path)
    with pytest.raises(CameraError, match=f"{tmp_path} cannot be read"):
        read_json(tmp_path)


# Ranges of files


def refuse_with(number: int) -> Callable[..., int]:
    def refuse(*arguments: object) -> int:
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.fixture(params=["in the kernel", "through a buffer", "a little at a time"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ways in which the system may copy: each gives the same bytes."""
    if request.param == "through a buffer":
        monkeypatch.setattr(os, "copy_file_range", refuse_with(errno.EXDEV), raising=False)
        monkeypatch.setattr(files, "_BUFFER_BYTES", 7)
    elif request.param == "a little at a time":
        if not hasattr(os, "copy_file_range"):
            pytest.skip("this system copies through a buffer")
        whole = os.copy_file_range

        def little(source: int, target: int, count: int, *offsets: int) -> int:
            return whole(source, target, min(count, 5), *offsets)

        monkeypatch.setattr(os, "copy_file_range", little)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("offset", "target_offset", "count"), [(0, 0, 100), (13, 2, 50), (99, 120, 1), (5, 5, 0)]
)
def test_a_range_is_copied_and_the_rest_stays(
    tmp_path: Path, offset: int, target_offset: int, count: int
) -> None:
    source, target = bytes(range(100)), b"x" * 150
    (tmp_path / "source").write_bytes(source)
    (tmp_path / "target").write_bytes(target)
    with (tmp_path / "target").open("r+b") as file:
        copy_bytes(tmp_path / "source", offset, file.fileno(), target_offset, count)
    wanted = target[:target_offset] + source[offset : offset + count] + target[target_offset + count :]
    assert (tmp_path / "target").read_bytes() == wanted
    assert (tmp_path / "source").read_bytes() == source


@pytest.mark.usefixtures("way")
def test_a_source_that_ends_too_early_is_named(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(bytes(100))
    with (
        (tmp_path / "target").open("w+b") as file,
        pytest.raises(CameraError, match="source ends 10 bytes too early"),
    ):
        copy_bytes(tmp_path / "source", 50, file.fileno(), 0, 60)


def test_a_full_disk_is_not_taken_for_a_kernel_that_cannot_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "copy_file_range", refuse_with(errno.ENOSPC), raising=False)
    (tmp_path / "source").write_bytes(bytes(100))
    with (tmp_path / "target").open("w+b") as file, pytest.raises(OSError, match="No space left"):
        copy_bytes(tmp_path / "source", 0, file.fileno(), 0, 100)


@pytest.mark.parametrize("size", [0, 1, 1_000_000])
def test_reserving_gives_the_size_and_keeps_what_is_there(tmp_path: Path, size: int) -> None:
    with (tmp_path / "x").open("w+b") as file:
        file.write(b"head")
        file.flush()
        files.reserve(file.fileno(), size)
    data = (tmp_path / "x").read_bytes()
    assert data == b"head"[:size] + bytes(max(0, size - 4))


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="no such call on this system")
def test_where_room_cannot_be_promised_the_size_is_given_and_a_full_disk_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "x").open("w+b") as file:
        monkeypatch.setattr(os, "posix_fallocate", refuse_with(errno.EOPNOTSUPP))
        files.reserve(file.fileno(), 1000)
        assert os.fstat(file.fileno()).st_size == 1000
        monkeypatch.setattr(os, "posix_fallocate", refuse_with(errno.ENOSPC))
        with pytest.raises(OSError, match="No space left"):
            files.reserve(file.fileno(), 2000)
