"""Who signed a publication: the signature, whether one is required, and what was recorded of it, judged together.

A signature is of lineage.json's bytes, which name the sha256 of all that is published. It lies beside the published folder,
as its .dvc file does, so that signing changes nothing that was published. That there is one is recorded where whoever can
write the folder cannot: in MLflow's registry and in the store, by the digest of the lineage (tasks/signed.py).
"""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from camera.errors import CameraError, NetworkError
from camera.escape import one_line
from camera.files import atomic_file
from camera.locks import output_lock
from tasks import registry, ssh
from tasks.contents import followed, kind, place
from tasks.signed import Record, record_of, records_at, write_record
from tasks.ssh import NoToolError
from tasks.store import LINEAGE, MANIFEST, Store

SIGNERS = "allowed_signers"
"""In the project's folder: whose signatures count where no other list is given."""
REQUIRE_VARIABLE = "CAMERA_REQUIRE_SIGNATURE"
"""Where it is set, but to 0, false or no, nothing of the project passes without a signature."""
SIGNERS_VARIABLE = "CAMERA_ALLOWED_SIGNERS"
"""The path of another list."""


@dataclass(frozen=True)
class Judgement:
    """What is to be said of the signature of a publication; the words are the audit's."""

    verdict: Literal["attested", "verified", "consistent", "unverifiable", "wrong"]
    detail: str
    reason: Literal["", "absent", "offline", "unjudged"] = ""
    """Of what is unverifiable."""
    needed: str = ""
    """Why there must be a signature; nothing where none is needed."""

    @property
    def holds(self) -> bool:
        """Whether a publication may be given to others as it is: nothing is wrong, and what is needed is there."""
        return self.verdict in ("attested", "verified") or (self.verdict != "wrong" and not self.needed)


@dataclass(frozen=True)
class Trust:
    """Whose signatures count, and whether there must be one."""

    signers: Path | None
    required: str
    """By whom; nothing if by nobody."""


def trust(store: Store, signers: Path | None = None, required: bool = False) -> Trust:
    """What was asked for, and where nothing was, what the project says.

    Args:
        store: the project's.
        signers: a list of allowed signers; else that of $CAMERA_ALLOWED_SIGNERS, or `allowed_signers` in the project's folder.
        required: whether the caller requires a signature; $CAMERA_REQUIRE_SIGNATURE does too.

    Raises:
        CameraError: if the list cannot be read as one.
    """
    given = os.environ.get(SIGNERS_VARIABLE)
    ours = store.root.parent / SIGNERS
    found = signers or (Path(given) if given else None) or (ours if ours.exists() else None)
    if found is not None:
        ssh.read_signers(found)
    by = "by whoever asks" if required else ""
    if not by and os.environ.get(REQUIRE_VARIABLE, "").lower() not in ("", "0", "false", "no"):
        by = f"by ${REQUIRE_VARIABLE}"
    return Trust(found, by)


def signature_of(folder: Path) -> Path:
    """Where the signature of a published folder's lineage.json is, or would be."""
    at = place(folder)
    return at.with_name(f"{at.name}.{LINEAGE}.sig")


def judge(
    folder: Path,
    store: Store,
    *,
    signers: Path | None = None,
    required: bool = False,
    version: registry.Version | None = None,
) -> Judgement | None:
    """Judge the signature of what lies in a folder; None where there is none and none is needed.

    One is needed if the caller, the environment or its recipe requires it; if the registry or the store recorded that this
    publication was signed; or if a signed one was published in this place and nobody knows what lies there now.

    Args:
        folder: what was published, or may have been: whatever is left of it.
        store: the project's.
        signers, required: as for `trust`.
        version: for a copy that DVC gave: the version it is of, whose signature the registry keeps.

    Raises:
        CameraError: if the list of signers cannot be read as one.
    """
    ask = trust(store, signers, required)
    stored = place(folder).is_relative_to(place(store.root))
    if stored and not ask.required and kind(folder / MANIFEST) == "a file":
        return None  # an artifact: only publications are signed
    try:
        document = _document(folder)
    except CameraError:
        document = None
    offline = ""
    try:
        record, replaced = _recorded(folder, store, version)
    except NetworkError as error:
        record, replaced, offline = record_of(store, registry.lineage_digest(folder)), False, str(error)
    except CameraError as error:  # a record that is damaged is no reason to ask for less
        return Judgement("wrong", str(error), needed="there is a record of it")
    needed = f"required {ask.required}" if ask.required else record.needed
    if replaced and not ask.required:
        needed = f"this is not the publication that was here: {record.needed}"
    try:
        signature = ssh.read_signature(signature_of(folder))
    except CameraError as error:
        return Judgement("wrong", str(error), needed=needed)
    if signature is None and version is not None and place(version.folder) != place(folder):
        signature = record.signature.encode() or None
    if signature is None or document is None:
        if needed:
            lacking = signature_of(folder).name if signature is None else LINEAGE
            return Judgement("wrong", f"{needed}, and there is no {one_line(lacking)}", needed=needed)
        if offline and document is not None:
            return Judgement("unverifiable", f"whether it was signed is not known: {offline}", "offline")
        return None
    return replace(_of_bytes(document, signature, ask, Record() if replaced else record), needed=needed)


def _of_bytes(document: bytes, signature: bytes, ask: Trust, record: Record) -> Judgement:
    try:
        key = ssh.fingerprint(document, signature)
        if record.key and key != record.key:
            return Judgement(
                "wrong", f"by {key}, and recorded as {record.signer}: `camera sign` records another"
            )
        if ask.signers is not None:
            name = ssh.principal(document, signature, ask.signers)
            return Judgement("attested", f"by {one_line(name)} ({key})")
    except NoToolError as error:
        return Judgement("unverifiable", str(error), "absent")
    except CameraError as error:
        return Judgement("wrong", one_line(error))
    believed = f"give --signers, or write {SIGNERS} in the project's folder, to say whose is believed"
    if ask.required:
        return Judgement("unverifiable", f"by {key}: {believed}", "unjudged")
    if record.key:
        return Judgement("verified", f"by {record.signer}, as was recorded when it was made")
    return Judgement("consistent", f"by {key}: {believed}")


def _recorded(folder: Path, store: Store, version: registry.Version | None) -> tuple[Record, bool]:
    """What the registry and the store recorded of the publication in a folder.

    Returns:
        The record; and whether it is of another publication that should be there, while nobody knows this one.

    Raises:
        NetworkError: if MLflow cannot be reached.
        CameraError: if a record is damaged.
    """
    digest = registry.lineage_digest(folder) if version is None else version.lineage_digest
    entries = [] if digest is None else registry.versions_of(digest)
    known = [*map(Record.of, entries), record_of(store, digest)]
    signed = sorted({record.signer: None for record in known if record.key})
    if len({record.key for record in known if record.key}) > 1:
        raise CameraError(f"the records differ in who signed it: {' and '.join(signed)}; sign it again")
    if any(record.digest for record in known):
        required = any(record.required for record in known)
        first = next((record for record in known if record.key), known[0])
        return first.model_copy(update={"required": required}), False
    at = place(folder)
    others = (entry for entry in registry.versions(at.name) if place(entry.folder) == at)
    needing = (record for record in (*map(Record.of, others), *records_at(store, at)) if record.needed)
    other = next(needing, None)
    return (Record(), False) if other is None else (other, True)


@dataclass(frozen=True)
class Signed:
    """A signature that was made."""

    path: Path
    record: Record
    recorded: tuple[str, ...]
    """Where else it is recorded, in words."""


def sign(folder: Path, key: Path, store: Store, wrongs: Callable[[Path], list[str]]) -> Signed:
    """Sign a published folder's lineage.json once the folder was found to be right, and record who did.

    The signature that was there stays until the new one is verified, recorded and whole.

    Args:
        folder: a published folder.
        key: a private SSH key, or a public one whose private half the SSH agent holds.
        store: the project's.
        wrongs: audits the folder; what is wrong with it, in words.

    Raises:
        CameraError: if the folder is no publication or is not what its lineage says, or ssh-keygen cannot use the key.
        NetworkError: if MLflow, which is to record it, cannot be reached.
    """
    folder = followed(folder)
    path = signature_of(folder)
    with output_lock(place(folder), wait=True):
        document = _document(folder)
        digest = registry.lineage_digest(folder)
        if digest is None:
            raise CameraError(
                f"{folder / LINEAGE} does not have its own digest: it was changed after publishing"
            )
        if found := wrongs(folder):
            raise CameraError(
                f"{folder} is not signed: its audit fails" + "".join(f"\n  {one_line(x)}" for x in found)
            )
        known = registry.versions_of(digest)
        signature = ssh.sign(document, key)
        name, signers = "", trust(store).signers
        if signers is not None:
            name = ssh.principal(document, signature, signers)
        made = {
            "digest": digest,
            "folder": str(place(folder)),
            "key": ssh.fingerprint(document, signature),
            "principal": name,
            "sha256": hashlib.sha256(signature).hexdigest(),
            "signature": signature.decode("ascii"),
        }
        record = record_of(store, digest).model_copy(update=made)
        places: list[str] = []
        with atomic_file(path) as temporary:
            temporary.write_bytes(signature)
            if _document(folder) != document:
                raise CameraError(f"{folder / LINEAGE} changed while it was signed: run `camera sign` again")
            for version in known:
                registry.set_tags(version, record.tags())
                places.append(f"the registry ({version.label})")
            if store.is_writable():
                write_record(store, record)
                places.append("the store")
    return Signed(path, record, tuple(places))


def _document(folder: Path) -> bytes:
    if (found := kind(folder / LINEAGE)) != "a file":  # a pipe would wait for its writer
        raise CameraError(f"{folder} has no {LINEAGE} (it is {found or 'missing'}): give a published folder")
    try:
        return (folder / LINEAGE).read_bytes()
    except OSError as error:
        raise CameraError(f"{folder / LINEAGE} cannot be read: {error.strerror}") from None


def settle_signature(folder: Path, store: Store, digest: str) -> None:
    """Take away the signature of the publication that was here before, which records keep; put back this one's own.

    Call it with the folder's lock held, for a folder that holds the publication of this digest.
    """
    _retire(folder, store, digest)
    path, own = signature_of(folder), record_of(store, digest).signature
    if own and not path.exists():
        with atomic_file(path) as temporary:
            temporary.write_text(own, encoding="ascii")


def _retire(folder: Path, store: Store, digest: str) -> None:
    path = signature_of(folder)
    try:
        signature = ssh.read_signature(path)
    except CameraError:
        return  # whatever it is, the audit names it
    if signature is None:
        return
    sha256 = hashlib.sha256(signature).hexdigest()
    if any(each.sha256 == sha256 and each.digest != digest for each in records_at(store, place(folder))):
        path.unlink(missing_ok=True)
        return
    try:
        ssh.fingerprint(_document(folder), signature)
    except NoToolError:
        return
    except CameraError:  # of something else, and nobody recorded it
        path.replace(path.with_name(f"{path.name}.old"))
