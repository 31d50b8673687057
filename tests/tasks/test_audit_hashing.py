"""The digests of one audit: right, each file read once, and begun before they are asked for."""

import hashlib
import time
from collections import Counter
from pathlib import Path

import pytest

from camera.digests import digest_file
from tasks.audit.hashing import reading_ahead


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[Path]:
    """How often each file is read."""
    counted: Counter[Path] = Counter()

    def counting(path: Path) -> str:
        counted[path] += 1
        return digest_file(path)

    monkeypatch.setattr("tasks.audit.hashing.digest_file", counting)
    return counted


def test_the_digests_are_those_of_the_bytes(tmp_path: Path):
    contents = {"empty": b"", "small": b"abc", "large": bytes(range(256)) * 70_000}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    with reading_ahead() as hashes:
        found = hashes.digests(tmp_path, contents)
    assert found == {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    assert list(found) == sorted(contents)


def test_a_file_that_is_asked_for_again_is_not_read_again(tmp_path: Path, read: Counter[Path]):
    (tmp_path / "one").write_bytes(b"1")
    (tmp_path / "two").write_bytes(b"2")
    with reading_ahead() as hashes:
        hashes.begin([tmp_path / "one", tmp_path / "one"])
        hashes.digests(tmp_path, ["one", "two"])
        hashes.digests(tmp_path, ["two"])
    assert read == {tmp_path / "one": 1, tmp_path / "two": 1}


def test_a_file_is_hashed_though_nobody_has_asked_yet(tmp_path: Path, read: Counter[Path]):
    (tmp_path / "one").write_bytes(b"1")
    with reading_ahead() as hashes:
        hashes.begin([tmp_path / "one", tmp_path / "missing"])
        deadline = time.monotonic() + 30
        while not read and time.monotonic() < deadline:
            time.sleep(0.01)
    assert read == {tmp_path / "one": 1}


def test_a_file_that_is_gone_is_an_error_for_whoever_asks(tmp_path: Path):
    with reading_ahead() as hashes:
        hashes.begin([tmp_path / "gone"])
        with pytest.raises(FileNotFoundError):
            hashes.digests(tmp_path, ["gone"])
