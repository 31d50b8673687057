"""Signatures of lineage.json are ssh's: by whom, for what, and of which very bytes."""

import shutil
import subprocess
from pathlib import Path

import pytest

from camera.errors import CameraError
from tasks import signing

pytestmark = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="no ssh-keygen")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Something published."""
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "lineage.json").write_text('{"digest": "x"}\n')
    return tmp_path / "tiny"


def key(folder: Path, name: str) -> Path:
    path = folder / name
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path), "-C", name], check=True)
    return path


def signers(folder: Path, *names: str, namespace: str = signing.NAMESPACE) -> Path:
    lines = [f'{name} namespaces="{namespace}" {(folder / f"{name}.pub").read_text()}' for name in names]
    (folder / "signers").write_text("".join(lines))
    return folder / "signers"


def test_a_signature_lies_beside_the_folder_and_names_its_signer(folder: Path, tmp_path: Path) -> None:
    before = sorted(folder.iterdir())
    path = signing.sign(folder, key(tmp_path, "alice"))
    assert path == tmp_path / "tiny.lineage.json.sig"
    assert sorted(folder.iterdir()) == before
    assert signing.verify(folder / "lineage.json", path, signers(tmp_path, "alice")) == "alice"


def test_another_byte_is_not_what_was_signed(folder: Path, tmp_path: Path) -> None:
    path = signing.sign(folder, key(tmp_path, "alice"))
    (folder / "lineage.json").write_text('{"digest": "y"}\n')
    with pytest.raises(CameraError, match="does not fit"):
        signing.verify(folder / "lineage.json", path, signers(tmp_path, "alice"))


def test_a_stranger_and_a_key_for_something_else_do_not_count(folder: Path, tmp_path: Path) -> None:
    path = signing.sign(folder, key(tmp_path, "mallory"))
    key(tmp_path, "alice")
    with pytest.raises(CameraError, match="no trusted key in"):
        signing.verify(folder / "lineage.json", path, signers(tmp_path, "alice"))
    with pytest.raises(CameraError):
        signing.verify(folder / "lineage.json", path, signers(tmp_path, "mallory", namespace="git"))


def test_a_missing_key_list_or_tool_says_what_to_do(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CameraError, match="ssh-keygen -t ed25519"):
        signing.sign(folder, tmp_path / "no key")
    alice = key(tmp_path, "alice")
    path = signing.sign(folder, alice)
    with pytest.raises(CameraError, match="--signers"):
        signing.verify(folder / "lineage.json", path, tmp_path / "no list")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(signing.NoToolError, match="install OpenSSH"):
        signing.sign(folder, alice)
