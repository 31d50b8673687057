"""The artifact store: content-addressed folders that are whole and verified, or do not exist.

<store>/<stage>/<key>/            an artifact, with manifest.json and lineage.json beside its files
<store>/<stage>/.<key>.working/   the same being made; a killed stage resumes in it
<store>/.locks/<key>              locked by the process that makes it
<store>/.evicted/<stage>/<key>/   manifest.json and lineage.json of an artifact whose files `camera gc` removed
<store>/.published/<digest>.json  what was published, and who signed it, see tasks/signed.py
<store>/.running/                 keys that runs at work refer to, see tasks/lease.py
"""

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from camera.digests import digest_file, digest_files, digest_json, files_below
from camera.disk import READ_ONLY
from camera.errors import CameraError
from camera.files import atomic_folder, hide, move_into_place, read_json, write_json
from camera.locks import lock, try_lock
from tasks.contents import EMPTY, contents

MANIFEST = "manifest.json"
LINEAGE = "lineage.json"
_FORMAT = 1
_NOT_CONTENT = (MANIFEST, LINEAGE)
Digests = Callable[[Path, Iterable[str]], dict[str, str]]
"""Gives hex sha256 of files of a folder, by relative name."""


@dataclass(frozen=True)
class Artifact:
    """One finished folder of the store."""

    path: Path
    manifest: dict[str, Any]
    evicted: bool = False
    """Whether only manifest and lineage are left: enough to name it, not to read it."""

    @property
    def stage(self) -> str:
        return str(self.manifest["stage"])

    @property
    def key(self) -> str:
        return str(self.manifest["key"])

    @property
    def digest(self) -> str:
        """Content digest: of the names and sha256 of all files but manifest and lineage."""
        return str(self.manifest["digest"])

    @property
    def sha256(self) -> dict[str, str]:
        """Of every file but manifest and lineage, by name."""
        return {name: str(entry["sha256"]) for name, entry in self.manifest["files"].items()}

    @property
    def metrics(self) -> dict[str, float]:
        """Numbers that the stage measured."""
        return dict(self.manifest["metrics"])

    @property
    def seconds(self) -> float:
        """How long making it took."""
        return float(self.manifest["seconds"])

    @property
    def size_bytes(self) -> int:
        return sum(int(entry["size"]) for entry in self.manifest["files"].values())

    def read_lineage(self) -> dict[str, Any]:
        lineage: dict[str, Any] = read_json(self.path / LINEAGE)
        return lineage


class Store:
    """Artifacts by stage and key."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, stage: str, key: str) -> Path:
        """Where an artifact is, or would be."""
        return self.root / stage / key

    def working(self, stage: str, key: str) -> Path:
        """Where an artifact is made."""
        return self.root / stage / f".{key}.working"

    def find(self, stage: str, key: str) -> Artifact | None:
        """The artifact if it is there and every byte of it is what its manifest says, else None."""
        path = self.path(stage, key)
        if not (path / MANIFEST).is_file() or self.damage(stage, key) is not None:
            return None
        with suppress(OSError):  # a store that is mounted read-only is read all the same
            os.utime(path / MANIFEST)  # the time of the last use, for whoever must make room
        return self.open(stage, key)

    def peek(self, stage: str, key: str) -> Artifact | None:
        """The artifact if its manifest is intact, else None. Its files are not read: for estimates only."""
        return None if _manifest_damage(self.path(stage, key), stage, key) else self.open(stage, key)

    def all(self, stage: str = "*") -> Iterator[Artifact]:
        """Every artifact whose manifest is intact, of one stage or of all; files are not read."""
        for manifest in sorted(self.root.glob(f"{stage}/*/{MANIFEST}")):
            kind, key = manifest.parent.parent.name, manifest.parent.name
            if not kind.startswith(".") and not key.startswith(".") and (found := self.peek(kind, key)):
                yield found

    def evicted(self, stage: str, key: str) -> Artifact | None:
        """An artifact of which only manifest and lineage are left, both intact; None if it is whole or unknown."""
        path = self.tombstone(stage, key)
        if self.path(stage, key).exists() or not (path / MANIFEST).is_file():
            return None
        if _manifest_damage(path, stage, key) or _lineage_damage(path, read_json(path / MANIFEST)):
            return None
        return Artifact(path, read_json(path / MANIFEST), evicted=True)

    def tombstone(self, stage: str, key: str) -> Path:
        """Where manifest and lineage of an evicted artifact are."""
        return self.root / ".evicted" / stage / key

    def publication(self, digest: str) -> Path:
        """Where the record of a publication is, by the digest of its lineage; see tasks/signed.py."""
        return self.root / ".published" / f"{digest}.json"

    def open(self, stage: str, key: str) -> Artifact:
        """An artifact that was verified a moment ago."""
        path = self.path(stage, key)
        return Artifact(path, read_json(path / MANIFEST))

    def damage(self, stage: str, key: str, digests: Digests = digest_files) -> str | None:
        """What is wrong with an artifact that is there, in words, or None. Hashes every byte.

        Args:
            stage, key: the artifact's name.
            digests: what hashes; a reader of many artifacts has its own.
        """
        path = self.path(stage, key)
        return damage_at(path, stage, key, digests) if path.exists() else None

    @contextmanager
    def lock(self, key: str, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Hold a key exclusively, across threads and processes.

        In a read-only store nobody makes anything, so there is nothing to lock.
        """
        if self.is_writable():
            with lock(self.root / ".locks" / key, waiting=waiting):
                yield
        else:
            yield

    @contextmanager
    def try_lock(self, key: str) -> Iterator[bool]:
        """Hold a key exclusively if nobody does; gives whether it is held now."""
        with try_lock(self.root / ".locks" / key) as free:
            yield free

    def is_writable(self) -> bool:
        """Whether this process may make and lock artifacts here."""
        locks = self.root / ".locks"
        try:
            locks.mkdir(parents=True, exist_ok=True)
            return os.access(locks, os.W_OK)
        except OSError as error:
            if error.errno in READ_ONLY:
                return False
            raise

    def evict(self, stage: str, key: str) -> Path:
        """Take an artifact out, leaving manifest and lineage. Call with the key's lock held.

        Whenever this is killed, the artifact is either whole or evicted.

        Returns:
            The folder with its files, out of sight; the caller deletes it.
        """
        path, tombstone = self.path(stage, key), self.tombstone(stage, key)
        if _manifest_damage(path, stage, key) is None:
            shutil.rmtree(tombstone, ignore_errors=True)
            with atomic_folder(tombstone) as folder:
                for name in _NOT_CONTENT:
                    shutil.copyfile(path / name, folder / name)
        return hide(path)

    def make(
        self,
        stage: str,
        key: str,
        fill: Callable[[Path], dict[str, float]],
        about: dict[str, Any],
        lineage: dict[str, Any],
        *,
        resumes: bool,
    ) -> Artifact:
        """Fill a working folder, then publish it under its key. Call with the key's lock held.

        Args:
            stage, key: the artifact's name.
            fill: writes the content into the folder it is given and returns metrics.
            about: what the manifest says beside files and digest (version, options, inputs).
            lineage: written as lineage.json.
            resumes: whether `fill` goes on from what a killed one left; if not it gets an empty folder.
        """
        final = self.path(stage, key)
        working = self.working(stage, key)
        if final.exists():  # damaged, or it would have been found
            _remove(final)
        if working.exists() and not resumes:
            _remove(working)
        working.mkdir(parents=True, exist_ok=True)
        for path in working.rglob(".*.tmp"):  # of a killed process: no later one knows the name
            if path.is_file():
                path.unlink()
        started = time.monotonic()
        metrics = fill(working)
        seconds = time.monotonic() - started
        names = [name for name in files_below(working) if name not in _NOT_CONTENT]
        hashes = digest_files(working, names)
        write_json(working / LINEAGE, lineage)
        manifest = {
            "format": _FORMAT,
            "stage": stage,
            "key": key,
            **about,
            "files": {
                name: {"size": (working / name).stat().st_size, "sha256": hashes[name]}
                for name in sorted(names)
            },
            "digest": digest_json(hashes),
            "lineage_sha256": digest_file(working / LINEAGE),
            "metrics": metrics,
            "seconds": round(seconds, 3),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_json(working / MANIFEST, {**manifest, "checksum": _checksum(manifest)})
        for name in files_below(working):
            (working / name).chmod(0o444)  # an artifact is never edited in place
        move_into_place(working, final)
        shutil.rmtree(self.tombstone(stage, key), ignore_errors=True)
        return self.open(stage, key)


def damage_at(path: Path, stage: str, key: str, digests: Digests = digest_files) -> str | None:
    """What is wrong with an artifact, wherever its folder lies, in words, or None. Hashes every byte.

    Raises:
        OSError: if a file cannot be read.
    """
    if (damage := _manifest_damage(path, stage, key)) is not None:
        return damage
    manifest = read_json(path / MANIFEST)
    if (damage := _lineage_damage(path, manifest)) is not None:
        return damage
    expected = {name: entry["sha256"] for name, entry in manifest["files"].items()}
    files, beyond = contents(path)
    for name, what in beyond.items():
        if what != EMPTY:
            return f"{path / name} is {what}, and not part of the artifact"
    present = [name for name in files if name not in _NOT_CONTENT]
    for name in sorted(set(expected) ^ set(present)):
        return f"{path / name} is {'missing' if name in expected else 'not part of the artifact'}"
    for name, found in digests(path, present).items():
        if found != expected[name]:
            return f"{path / name} does not have the sha256 in its manifest"
    if digest_json(expected) != manifest["digest"]:
        return f"{path / MANIFEST} does not have the digest of its files"
    return None


def _checksum(manifest: dict[str, Any]) -> str:
    """Digest of all that a manifest says, so that no field of it can change unseen."""
    return digest_json({name: value for name, value in manifest.items() if name != "checksum"})


def _manifest_damage(path: Path, stage: str, key: str) -> str | None:
    try:
        manifest = read_json(path / MANIFEST)
    except CameraError as error:
        return str(error)
    if not isinstance(manifest, dict):
        return f"{path / MANIFEST} does not hold a JSON object"
    if manifest.get("format") != _FORMAT or manifest.get("key") != key or manifest.get("stage") != stage:
        return f"{path / MANIFEST} is of another format or key"
    try:
        whole = manifest.get("checksum") == _checksum(manifest)
    except (ValueError, RecursionError):  # NaN, or half a character, which have no digest
        whole = False
    if not whole:
        return f"{path / MANIFEST} does not have its own checksum: it was changed after it was written"
    texts = [manifest.get("digest"), manifest.get("lineage_sha256")]
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        return f"{path / MANIFEST} does not say which files there are"
    if not all(
        isinstance(text, str) for text in (*texts, *(entry.get("sha256") for entry in files.values()))
    ):
        return f"{path / MANIFEST} does not say which bytes there are"
    return None


def _lineage_damage(path: Path, manifest: dict[str, Any]) -> str | None:
    if not (path / LINEAGE).is_file():
        return f"{path / LINEAGE} is missing"
    if digest_file(path / LINEAGE) != manifest["lineage_sha256"]:
        return f"{path / LINEAGE} does not have the sha256 in its manifest"
    return None


def _remove(folder: Path) -> None:
    shutil.rmtree(hide(folder), ignore_errors=True)  # `camera gc` may be deleting it too
