"""Files are read as they were hashed, whoever changes them meanwhile and puts them back."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import camera.held as held_files
from camera import identity
from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import TensorInfo, read_header, read_tensors, write_tensors
from camera.files import copy_file, read_json
from camera.formats.model_facts import model_facts
from camera.held import (
    Held,
    SourceChangedError,
    _expectations,
    expecting,
    hold,
    holding,
    note,
    opened,
    own_copy,
)
from tests.adversary import DECEITS, while_swapped
from tests.tiny import tiny_checkpoint

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    here = tmp_path / "above" / "source"
    here.mkdir(parents=True)
    (here / "numbers").write_bytes(b"0123456789")
    (here / "config.json").write_text('{"size": 1}')
    (here / "link").symlink_to("numbers")
    return here


@pytest.fixture
def held(folder: Path) -> Held:
    return hold(folder, ["numbers", "config.json", "link"])


def test_what_nobody_touched_is_what_was_hashed(folder: Path, held: Held) -> None:
    with holding(held):
        assert opened(folder / "numbers").read() == b"0123456789"
        (folder / "note").write_text("beside it")
    held.check()


def test_files_that_are_read_or_linked_to_elsewhere_are_no_others(folder: Path, held: Held) -> None:
    (folder / "numbers").read_bytes()
    (folder.parent / "note").write_text("in the folder above")
    held.check()


@pytest.mark.parametrize("name", ["numbers", "link"])
@pytest.mark.parametrize("deceit", [each for each in DECEITS if each != "folder above"])
def test_whatever_is_changed_and_put_back_is_seen_afterwards(
    folder: Path, held: Held, deceit: str, name: str
) -> None:
    with pytest.raises(SourceChangedError, match=r"was changed or replaced .*run again"), holding(held):
        DECEITS[deceit](folder, name).swap().restore()


@pytest.mark.parametrize("deceit", DECEITS)
@pytest.mark.parametrize(
    "read",
    [
        lambda path, out: opened(path).read(),
        lambda path, out: read_json(path),
        lambda path, out: copy_file(path, out / "copy"),
    ],
    ids=["opened", "read_json", "copy_file"],
)
def test_what_lies_in_its_place_meanwhile_is_never_read(
    folder: Path, tmp_path: Path, deceit: str, read: Callable[[Path, Path], object]
) -> None:
    held = hold(folder, ["config.json"])
    with pytest.raises(SourceChangedError), holding(held), while_swapped(deceit, folder, "config.json"):
        read(folder / "config.json", tmp_path)
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("added", ["added_tokens.json", "additional_chat_templates/x.jinja"])
def test_a_file_that_was_added_is_not_read(folder: Path, added: str) -> None:
    held = hold(folder, ["numbers", "config.json", "link"], "here")
    (folder / added).parent.mkdir(exist_ok=True)
    (folder / added).write_text("{}")
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "b" / "deeper").write_text("of another")
    with holding(held):
        opened(folder / "a" / "b" / "deeper").close()
    with pytest.raises(SourceChangedError, match="was not there when its folder was hashed"), holding(held):
        opened(folder / added)


def test_a_library_is_given_copies_of_what_was_hashed(folder: Path) -> None:
    with own_copy(folder) as place:
        assert place == folder
    with holding(hold(folder, ["config.json"])), own_copy(folder) as place:
        assert [path.name for path in place.iterdir()] == ["config.json"]
    held = hold(folder, ["config.json"])
    with (
        pytest.raises(SourceChangedError),
        holding(held),
        while_swapped("folder above", folder, "config.json"),
    ):
        own_copy(folder).__enter__()


def test_an_error_that_somebody_swallows_is_raised_at_the_end(folder: Path) -> None:
    def swallowing() -> None:
        with suppress(Exception), while_swapped("folder above", folder, "numbers"):
            opened(folder / "numbers")

    with pytest.raises(SourceChangedError), holding(hold(folder, ["numbers"])):
        swallowing()
    with holding(hold(folder, ["numbers"])):
        opened(folder / "numbers").close()


def test_weights_of_a_folder_that_was_swapped_are_never_read(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "above" / "model", "llama")
    checkpoint = Checkpoint.open(folder)
    held = hold(folder, checkpoint.files)
    for read in (
        checkpoint.read,
        lambda name: checkpoint.rows(name)[:1],
        lambda name: Checkpoint.open(folder),
    ):
        with holding(held):
            read("model.norm.weight")
        with pytest.raises(SourceChangedError), holding(held), while_swapped("folder above", folder, WEIGHTS):
            read("model.norm.weight")


def test_a_file_that_is_written_while_it_is_hashed_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from camera import held

    def hashed_and_written(file: object, size: int) -> str:
        (folder / "numbers").write_bytes(b"9876543210")
        return "0" * 64

    monkeypatch.setattr(held, "digest_open", hashed_and_written)
    with pytest.raises(SourceChangedError, match="changes while it is hashed"):
        hold(folder, ["numbers"])


def test_a_change_right_after_hashing_has_another_time(folder: Path) -> None:
    for number in range(20):
        (folder / "numbers").write_bytes(b"%010d" % number)
        held = hold(folder, ["numbers"])
        with (folder / "numbers").open("r+b") as file:
            file.write(b"x")
        with pytest.raises(SourceChangedError):
            held.check()


def written_unseen(path: Path, data: bytes) -> None:
    """With its time of change as it was."""
    times = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_where_times_cannot_be_relied_on_the_bytes_are_hashed_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "_mounts", lambda: {"/": "nfs4"})
    held = hold(folder, ["numbers", "config.json", "link"])
    with holding(held):
        (folder / "numbers").chmod(0o600)  # a new ctime, which says nothing here
        opened(folder / "numbers").close()
    with pytest.raises(SourceChangedError), holding(held):
        written_unseen(folder / "numbers", b"0123456780")


@pytest.mark.parametrize("kind", ["nfs4", "fuse.sshfs"])
def test_what_even_such_times_tell_is_heard_without_hashing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(identity, "_mounts", lambda: {"/": kind})
    for data in (b"longer than it was", b"9876543210"):
        noted = note(folder, ["numbers"])
        (folder / "numbers").write_bytes(data)
        with expecting(_expectations([noted])), pytest.raises(SourceChangedError):
            opened(folder / "numbers")
        with pytest.raises(SourceChangedError):
            noted.check()


def test_where_times_cannot_be_relied_on_a_stage_hashes_its_files_once_more(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "_mounts", lambda: {"/": "nfs4"})
    held, hashed = hold(folder, ["numbers", "config.json"]), []
    real = held_files.digest_open
    monkeypatch.setattr(
        held_files, "digest_open", lambda file, size: (hashed.append(file.name), real(file, size))[1]
    )
    with holding(held):
        assert hashed == []
    assert len(hashed) == 2
    with holding(held.only(["config.json"])):
        pass
    assert len(hashed) == 3
    with holding(held, again=False):
        pass
    assert len(hashed) == 3


def test_a_place_of_a_network_is_known_by_its_name_in_any_script_and_through_links(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "1 0 0:1 / / rw - ext4 a rw\n2 1 0:2 / /mnt/数据\\040a rw shared:1 - nfs4 b rw\n"
    assert identity._mounts_of(os.fsencode(lines)) == {"/": "ext4", "/mnt/数据 a": "nfs4"}
    monkeypatch.setattr(identity, "_mounts", lambda: {"/": "ext4", str(folder.parent / "far"): "nfs4"})
    (folder.parent / "far").mkdir()
    (folder.parent / "far" / "blob").write_bytes(b"0123456789")
    (folder / "linked").symlink_to("../far/blob")
    held = hold(folder, ["linked", "numbers"])
    monkeypatch.setattr(held_files, "digest_open", lambda file, size: "0" * 64)
    held.only(["numbers"]).check()
    with pytest.raises(SourceChangedError, match="linked"):
        held.check()


def test_files_that_do_not_decide_may_change(folder: Path) -> None:
    held = hold(folder, ["numbers", "config.json"], "here").only(["config.json"])
    before = held.mark
    with holding(held):
        (folder / "numbers").write_bytes(b"others")
        assert opened(folder / "numbers").read() == b"others"
        (folder / "numbers").unlink()
    assert held.mark == before
    with pytest.raises(SourceChangedError), holding(held):
        (folder / "config.json").touch()


def test_tensors_of_a_file_that_was_swapped_after_its_header_was_read_are_not_those_of_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "above" / "source" / "tokens.safetensors"
    path.parent.mkdir(parents=True)
    write_tensors(path, {"input_ids": torch.tensor([1])})

    deceit = DECEITS["folder above"](path.parent, path.name)

    def looked_at_and_swapped(path: Path) -> dict[str, TensorInfo]:
        infos = read_header(path)
        deceit.swap()
        return infos

    monkeypatch.setattr("camera.checkpoints.safetensors_file.read_header", looked_at_and_swapped)
    with expecting(_expectations([hold(path.parent, [path.name])])), pytest.raises(SourceChangedError):
        read_tensors(path)


def test_the_card_of_a_folder_that_was_swapped_is_not_read(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: mit1\n---\n")
    held = hold(folder, ["README.md"])
    with holding(held):
        assert model_facts(folder).license == "mit1"
    with (
        pytest.raises(SourceChangedError),
        holding(held),
        while_swapped("folder above", folder, "README.md"),
    ):
        model_facts(folder)
