"""ssh's signatures of files (`ssh-keygen -Y`): made, checked, and held to a list of allowed signers.

What is signed and the signature are given as bytes that were read once: a file that changes meanwhile changes nothing.
"""

import base64
import binascii
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from camera.errors import CameraError

NAMESPACE = "camera-lineage"
"""What the signature is for; one made for something else does not verify."""
REVOKED = "revoked_keys"
"""Beside a list of allowed signers: keys, or a KRL of ssh's, that count no more."""
_TIMEOUT = 60
_MAX_BYTES = 64 << 10
"""Of a signature; one by an RSA key of 16384 bits has 6 kB."""
_MAX_LIST_BYTES = 4 << 20
_FINGERPRINT = re.compile(r" key (SHA256:[A-Za-z0-9+/]{43})")
_OPTION = re.compile(r"(?i)cert-authority|(namespaces|valid-after|valid-before)=")


class NoToolError(CameraError):
    """This machine cannot sign or verify."""


def sign(document: bytes, key: Path) -> bytes:
    """The signature of a document, verified by the public key before it is handed on.

    Args:
        document: what is signed.
        key: a private SSH key, or a public one whose private half the SSH agent holds.

    Raises:
        NoToolError: without ssh-keygen.
        CameraError: if there is no such key, or ssh-keygen cannot use it.
    """
    if not key.is_file():
        raise CameraError(f"--key {key} does not exist: `ssh-keygen -t ed25519` makes a key")
    done = _ssh_keygen("sign", "-f", str(key), "-n", NAMESPACE, stdin=document)
    if done.returncode != 0:
        raise CameraError(f"ssh-keygen cannot sign with {key}: {_message(done)}")
    try:
        fingerprint(document, done.stdout)
    except CameraError as error:
        raise CameraError(f"ssh-keygen made no signature that verifies with {key}: {error}") from None
    return done.stdout


def read_signature(path: Path) -> bytes | None:
    """The bytes of a signature file; None if there is none.

    Raises:
        CameraError: if it is no file, too large for a signature, or cannot be read.
    """
    try:
        if path.is_file():
            with path.open("rb") as file:
                content = file.read(_MAX_BYTES + 1)
            if len(content) <= _MAX_BYTES:
                return content
            raise CameraError(f"{path} is larger than any signature")
    except OSError as error:
        raise CameraError(f"{path} cannot be read: {error.strerror}") from None
    if path.exists() or path.is_symlink():
        raise CameraError(f"{path} is no file that holds a signature")
    return None


def fingerprint(document: bytes, signature: bytes) -> str:
    """The fingerprint of the key that signed this document, whoever has it: `SHA256:…`.

    Raises:
        NoToolError: without ssh-keygen.
        CameraError: if the signature is not of this document.
    """
    with _written(signature) as at:
        done = _ssh_keygen("check-novalidate", "-n", NAMESPACE, "-s", str(at), stdin=document)
    found = _FINGERPRINT.search(done.stdout.decode(errors="replace"))
    if done.returncode != 0 or found is None:
        raise CameraError(f"the signature does not fit: {_message(done)}")
    return found[1]


def principal(document: bytes, signature: bytes, signers: Path) -> str:
    """The name under which a list of allowed signers trusts the key that signed this document.

    Args:
        document: what was signed.
        signature: its signature.
        signers: ssh's ALLOWED SIGNERS file: a line `name namespaces="camera-lineage" ssh-ed25519 …` each. Keys in a file
            `revoked_keys` beside it do not count.

    Raises:
        NoToolError: without ssh-keygen.
        CameraError: if the list cannot be read, or nobody in it signed this very document.
    """
    lines = read_signers(signers)
    revoked = signers.with_name(REVOKED)
    if revoked.exists() and not revoked.is_file():
        raise CameraError(f"{revoked} is no file that lists revoked keys")
    reason = ""
    with _written(signature) as at:
        listed = at.with_name("signers")
        # ssh looks for the key in the first line that has it, though another may trust it for this purpose.
        for text in dict.fromkeys(["\n".join(lines), *lines]):
            listed.write_text(text + "\n", encoding="utf-8", errors="surrogateescape")
            given = ["-f", str(listed), "-s", str(at)]
            found = _ssh_keygen("find-principals", *given)
            if found.returncode != 0:
                reason = reason or _message(found)
                continue
            given += ["-n", NAMESPACE, *(["-r", str(revoked)] if revoked.exists() else [])]
            for name in found.stdout.decode(errors="replace").splitlines():
                done = _ssh_keygen("verify", *given, "-I", name, stdin=document)
                if done.returncode == 0:
                    return name
                reason = _message(done)
    if revoked.exists():
        reason += f" (see {revoked} too)"
    if broken := _broken(signers, _lines(signers)):
        reason += f" ({broken})"
    raise CameraError(
        f"no trusted key in {signers} made the signature: {reason.replace(str(listed), str(signers))}"
    )


def read_signers(signers: Path) -> list[str]:
    """The lines of a list of allowed signers that hold a whole key.

    Others are left out, as ssh does. So is what follows of a signer that was written over two lines: the options that were
    to bind a key would bind it no more.

    Raises:
        CameraError: if the list cannot be read, or no line of it is whole though some are written.
    """
    lines = _lines(signers)
    whole = [line for line in lines.values() if _is_whole(line)]
    if lines and not whole:
        raise CameraError(_broken(signers, lines))
    return whole


def _lines(signers: Path) -> dict[int, str]:
    """The lines that are no comments, by number."""
    if not signers.exists():
        raise CameraError(f"--signers {signers} does not exist: one `name ssh-ed25519 AAAA…` a line")
    try:
        if not signers.is_file() or signers.stat().st_size > _MAX_LIST_BYTES:
            raise CameraError(f"--signers {signers} is no file that lists signers")
        text = signers.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise CameraError(f"--signers {signers} cannot be read: {error.strerror}") from None
    numbered = enumerate((line.strip() for line in text.split("\n")), 1)
    return {number: line for number, line in numbered if line and not line.startswith("#")}


def _broken(signers: Path, lines: dict[int, str]) -> str:
    """Which lines hold no whole key, in words; nothing if all do."""
    broken = [str(number) for number, line in lines.items() if not _is_whole(line)]
    if not broken:
        return ""
    named = f"{signers}:{','.join(broken)}"
    return f"{named} is no signer: write `name ssh-ed25519 AAAA…` with its options on one line"


def _is_whole(line: str) -> bool:
    """Whether a line has names, and after them a key of the type that it names."""
    first, *words = line.split()
    return not _OPTION.match(first) and any(map(_is_key, words, words[1:]))


def _is_key(kind: str, text: str) -> bool:
    try:
        key = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return False
    size = int.from_bytes(key[:4], "big")
    return len(key) > 4 + size and key[4 : 4 + size] == kind.encode(errors="replace")


@contextmanager
def _written(signature: bytes) -> Iterator[Path]:
    with TemporaryDirectory(prefix="camera-") as folder:
        path = Path(folder) / "signature"
        path.write_bytes(signature)
        yield path


def _ssh_keygen(action: str, *arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    tool = shutil.which("ssh-keygen")
    if tool is None:
        raise NoToolError(
            "ssh-keygen is not on this machine: install OpenSSH 8.2 or newer to sign and verify"
        )
    try:
        return subprocess.run(
            [tool, "-Y", action, *arguments], input=stdin, capture_output=True, check=False, timeout=_TIMEOUT
        )
    except subprocess.TimeoutExpired:
        raise CameraError(
            f"ssh-keygen waited for {_TIMEOUT} s: a key with a passphrase belongs in the agent"
        ) from None


def _message(done: subprocess.CompletedProcess[bytes]) -> str:
    text = " ".join((done.stderr or done.stdout).decode(errors="replace").split())
    return text or f"exit code {done.returncode}"
