"""Signatures are ssh's: by whom, for what, of which very bytes; and lists of signers are read as ssh reads them."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from camera.errors import CameraError
from tasks import ssh

pytestmark = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="no ssh-keygen")
DOCUMENT = b'{"digest": "x"}\n'


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The keys of alice and mallory, and a signature by each."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("alice", "mallory"):
        path = str(folder / name)
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path, "-C", f"{name}'s laptop"], check=True
        )
        (folder / f"{name}.sig").write_bytes(ssh.sign(DOCUMENT, folder / name))
    return folder


def public(keys: Path, name: str = "alice") -> str:
    return (keys / f"{name}.pub").read_text().strip()


def signer(keys: Path, tmp_path: Path, text: str, by: str = "alice", document: bytes = DOCUMENT) -> str:
    """Who signed, by a list of this text."""
    path = tmp_path / "signers"
    path.write_bytes(text.encode())
    return ssh.principal(document, (keys / f"{by}.sig").read_bytes(), path)


def test_a_signature_names_its_key_and_its_signer(keys: Path, tmp_path: Path) -> None:
    signature = (keys / "alice.sig").read_bytes()
    assert ssh.fingerprint(DOCUMENT, signature).startswith("SHA256:")
    assert signer(keys, tmp_path, f"alice {public(keys)}\n") == "alice"


def test_another_byte_is_not_what_was_signed(keys: Path, tmp_path: Path) -> None:
    with pytest.raises(CameraError, match="no trusted key"):
        signer(keys, tmp_path, f"alice {public(keys)}\n", document=DOCUMENT + b" ")
    with pytest.raises(CameraError, match="does not fit"):
        ssh.fingerprint(DOCUMENT + b" ", (keys / "alice.sig").read_bytes())


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("# who may\n\nalice {key}\n", "alice"),
        ("\ufeffalice {key}\r\n", "alice"),
        ("bob,alice,*@example.org {key}", "bob"),
        ('"alice smith,bob" {key}', "alice smith"),
        ("*@example.org {key}", "*@example.org"),
        ('alice namespaces="git,camera-lineage" {key}', "alice"),
        ('alice namespaces="git" {key}\nreleases namespaces="camera-lineage" {key}', "releases"),
        ('old valid-before="20200101" {key}\nalice valid-after="20200101" {key}', "alice"),
        ("alice\x1b[31m {key}", "alice\x1b[31m"),
    ],
)
def test_a_list_is_read_as_ssh_writes_it(keys: Path, tmp_path: Path, line: str, name: str) -> None:
    assert signer(keys, tmp_path, line.format(key=public(keys))) == name


@pytest.mark.parametrize(
    "line", ["alice {other}", 'alice namespaces="git" {key}', 'alice valid-before="20200101" {key}', ""]
)
def test_who_is_not_in_the_list_or_not_for_this_does_not_count(keys: Path, tmp_path: Path, line: str) -> None:
    with pytest.raises(CameraError, match=f"no trusted key in {tmp_path / 'signers'}"):
        signer(keys, tmp_path, line.format(key=public(keys), other=public(keys, "mallory")))


def test_a_key_over_two_lines_is_refused_and_the_lines_are_named(keys: Path, tmp_path: Path) -> None:
    kind, key, _ = public(keys).split(maxsplit=2)
    for text in (
        f"alice {kind}\n{key}\nmallory {{other}}",
        f"alice {kind} {key[:30]}\n{key[30:]} c\nmallory {{other}}",
        f"alice {kind} {key[:30]}\\\n{key[30:]}",
        f'alice\nnamespaces="git" {kind} {key}',  # ssh would trust this key for everything
        "alice",
    ):
        with pytest.raises(CameraError, match=r"signers:1(,2)? is no signer: write .* on one line"):
            signer(keys, tmp_path, text.format(other=public(keys, "mallory")))
    assert signer(keys, tmp_path, f"junk\nalice {public(keys)}") == "alice"  # ssh passes over it too


def test_a_revoked_key_counts_no_more(keys: Path, tmp_path: Path) -> None:
    (tmp_path / "revoked_keys").write_text(public(keys, "mallory") + "\n")
    assert signer(keys, tmp_path, f"alice {public(keys)}") == "alice"
    (tmp_path / "revoked_keys").write_text(public(keys) + "\n")
    with pytest.raises(CameraError, match=r"see .*revoked_keys too"):
        signer(keys, tmp_path, f"alice {public(keys)}")


def test_a_certificate_of_a_trusted_authority_counts(keys: Path, tmp_path: Path) -> None:
    for name in ("alice", "alice.pub"):
        shutil.copy(keys / name, tmp_path / name)
    certify = [
        "ssh-keygen",
        "-q",
        "-s",
        str(keys / "mallory"),
        "-I",
        "alice",
        "-n",
        "alice",
        str(tmp_path / "alice.pub"),
    ]
    subprocess.run(certify, check=True)
    signature = ssh.sign(DOCUMENT, tmp_path / "alice-cert.pub")
    path = tmp_path / "signers"
    path.write_text(f"alice cert-authority {public(keys, 'mallory')}\n")
    assert ssh.principal(DOCUMENT, signature, path) == "alice"
    path.write_text(f"alice {public(keys, 'mallory')}\n")  # her key alone made nothing
    with pytest.raises(CameraError):
        ssh.principal(DOCUMENT, signature, path)


def test_what_is_no_signature_file_is_refused_in_words(tmp_path: Path) -> None:
    assert ssh.read_signature(tmp_path / "none") is None
    (tmp_path / "big").write_bytes(b"x" * 100_000)
    (tmp_path / "folder").mkdir()
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CameraError, match="is no file that lists signers"):
        ssh.read_signers(tmp_path / "pipe")
    for name, reason in {
        "big": "larger than any signature",
        "folder": "no file",
        "pipe": "no file",
        "lost": "no file",
    }.items():
        with pytest.raises(CameraError, match=reason):
            ssh.read_signature(tmp_path / name)


def test_a_missing_key_list_or_tool_says_what_to_do(
    keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CameraError, match="ssh-keygen -t ed25519"):
        ssh.sign(DOCUMENT, tmp_path / "no key")
    with pytest.raises(CameraError, match="--signers"):
        ssh.read_signers(tmp_path / "no list")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ssh.NoToolError, match="install OpenSSH"):
        ssh.sign(DOCUMENT, keys / "alice")
