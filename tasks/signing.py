"""Signatures of lineage.json, by `ssh-keygen -Y`: made with an SSH key, verified with a list of allowed signers.

A signature lies beside the published folder, as its .dvc file does, so that signing changes nothing that was published.
"""

import shutil
import subprocess
from pathlib import Path

from camera.errors import CameraError
from tasks.store import LINEAGE

NAMESPACE = "camera-lineage"
"""What the signature is for; one made for something else does not verify."""
_TIMEOUT = 60


class NoToolError(CameraError):
    """This machine cannot sign or verify."""


def signature_of(folder: Path) -> Path:
    """Where the signature of a published folder's lineage.json is, or would be."""
    return folder.with_name(f"{folder.name}.{LINEAGE}.sig")


def sign(folder: Path, key: Path) -> Path:
    """Sign a published folder's lineage.json; a signature that is there is replaced.

    Args:
        folder: a published folder.
        key: a private SSH key, or a public one whose private half the SSH agent holds.

    Returns:
        The signature's path.

    Raises:
        CameraError: if the folder has no lineage, or ssh-keygen cannot use the key.
    """
    lineage = folder / LINEAGE
    if not lineage.is_file():
        raise CameraError(f"{folder} has no {LINEAGE}: give a published folder")
    if not key.is_file():
        raise CameraError(f"--key {key} does not exist: `ssh-keygen -t ed25519` makes a key")
    done = _ssh_keygen("sign", "-f", str(key), "-n", NAMESPACE, stdin=lineage)
    if done.returncode != 0:
        raise CameraError(f"ssh-keygen cannot sign with {key}: {_message(done)}")
    path = signature_of(folder)
    path.write_bytes(done.stdout)
    return path


def verify(lineage: Path, signature: Path, signers: Path) -> str:
    """The name of the trusted key that signed a lineage.

    Args:
        lineage: the file that was signed.
        signature: its signature.
        signers: ssh's ALLOWED SIGNERS file: a line `name namespaces="camera-lineage" ssh-ed25519 …` each.

    Raises:
        NoToolError: without ssh-keygen.
        CameraError: if nobody in the list signed this very file.
    """
    if not signers.is_file():
        raise CameraError(f"--signers {signers} does not exist: one `name ssh-ed25519 AAAA…` a line")
    found = _ssh_keygen("find-principals", "-s", str(signature), "-f", str(signers))
    names = found.stdout.decode(errors="replace").split()
    if found.returncode != 0 or not names:
        raise CameraError(f"no trusted key in {signers} made {signature.name}: {_message(found)}")
    given = ["-f", str(signers), "-I", names[0], "-n", NAMESPACE, "-s", str(signature)]
    done = _ssh_keygen("verify", *given, stdin=lineage)
    if done.returncode != 0:
        raise CameraError(f"{signature.name} does not fit {lineage}: {_message(done)}")
    return names[0]


def _ssh_keygen(
    action: str, *arguments: str, stdin: Path | None = None
) -> subprocess.CompletedProcess[bytes]:
    tool = shutil.which("ssh-keygen")
    if tool is None:
        raise NoToolError(
            "ssh-keygen is not on this machine: install OpenSSH 8.2 or newer to sign and verify"
        )
    given = b"" if stdin is None else stdin.read_bytes()
    try:
        return subprocess.run(
            [tool, "-Y", action, *arguments], input=given, capture_output=True, check=False, timeout=_TIMEOUT
        )
    except subprocess.TimeoutExpired:
        raise CameraError(
            f"ssh-keygen waited for {_TIMEOUT} s: a key with a passphrase belongs in the agent"
        ) from None


def _message(done: subprocess.CompletedProcess[bytes]) -> str:
    text = " ".join((done.stderr or done.stdout).decode(errors="replace").split())
    return text or f"exit code {done.returncode}"
