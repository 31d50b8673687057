"""The artifact store: content-addressed folders that are whole and verified, or do not exist.

<store>/<stage>/<key>/            an artifact, with manifest.json and lineage.json beside its files
<store>/<stage>/.<key>.working/   the same being made; a killed stage resumes in it
<store>/.locks/<key>              held (flock) by the process that makes it
<store>/.evicted/<stage>/<key>/   manifest.json and lineage.json of an artifact whose files `camera gc` removed
<store>/.running/                 what runs at work refer to, see tasks/lease.py
"""

import fcntl
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
from camera.files import is_still, read_json, sync, sync_tree, whole_folder, write_json
from camera.temporaries import this_writer

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

    def glance(self, stage: str, key: str) -> Artifact | None:
        """The artifact if its manifest is whole, else None. Its bytes are not looked at: for estimates only."""
        return None if _manifest_damage(self.path(stage, key), stage, key) else self.open(stage, key)

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
        if not path.exists():
            return None
        if (damage := _manifest_damage(path, stage, key)) is not None:
            return damage
        manifest = read_json(path / MANIFEST)
        if (damage := _lineage_damage(path, manifest)) is not None:
            return damage
        expected = {name: entry["sha256"] for name, entry in manifest["files"].items()}
        present = [name for name in files_below(path) if name not in _NOT_CONTENT]
        for name in sorted(set(expected) ^ set(present)):
            return f"{path / name} is {'missing' if name in expected else 'not part of the artifact'}"
        for name, found in digests(path, present).items():
            if found != expected[name]:
                return f"{path / name} does not have the sha256 in its manifest"
        if digest_json(expected) != manifest["digest"]:
            return f"{path / MANIFEST} does not have the digest of its files"
        return None

    @contextmanager
    def lock(self, key: str, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Hold a key alone, across threads and processes; the kernel frees it when the holder dies.

        In a store that cannot be written to nobody makes anything, so there is nothing to hold.
        """
        folder = self.root / ".locks"
        if not _writable(folder):
            yield
            return
        while True:
            with (folder / key).open("w") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    waiting()
                    fcntl.flock(file, fcntl.LOCK_EX)
                if is_still(file, folder / key):  # else the file was cleaned away, and others lock a new one
                    yield
                    return

    @contextmanager
    def lock_if_free(self, key: str) -> Iterator[bool]:
        """Hold a key alone if nobody holds it, and remove its lock file afterwards; else give False at once."""
        path = self.root / ".locks" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            if not is_still(file, path):
                yield False
                return
            try:
                yield True
            finally:
                path.unlink(missing_ok=True)  # while it is held, so that whoever waits for it notices

    def evict(self, stage: str, key: str) -> Path:
        """Take an artifact out, leaving manifest and lineage. Call with the key's lock held.

        Whenever this is killed, the artifact is either whole or evicted.

        Returns:
            The folder with its files, out of sight; the caller deletes it.
        """
        path, tombstone = self.path(stage, key), self.tombstone(stage, key)
        if _manifest_damage(path, stage, key) is None:
            shutil.rmtree(tombstone, ignore_errors=True)
            with whole_folder(tombstone) as folder:
                for name in _NOT_CONTENT:
                    shutil.copyfile(path / name, folder / name)
        return _doom(path)

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
        _sweep(working)
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
        sync_tree(working)
        os.rename(working, final)
        sync(final.parent)
        shutil.rmtree(self.tombstone(stage, key), ignore_errors=True)
        return self.open(stage, key)


def _writable(locks: Path) -> bool:
    try:
        locks.mkdir(parents=True, exist_ok=True)
        return os.access(locks, os.W_OK)
    except OSError as error:
        if error.errno in READ_ONLY:
            return False
        raise


def _checksum(manifest: dict[str, Any]) -> str:
    """Digest of all that a manifest says, so that no field of it can change unseen."""
    return digest_json({name: value for name, value in manifest.items() if name != "checksum"})


def _sweep(folder: Path) -> None:
    """Delete the temporaries of a killed process: no later one knows their names, and they would become content."""
    for path in folder.rglob(".*.tmp"):
        if path.is_file():
            path.unlink()


def _manifest_damage(path: Path, stage: str, key: str) -> str | None:
    try:
        manifest = read_json(path / MANIFEST)
    except CameraError as error:
        return str(error)
    if not isinstance(manifest, dict):
        return f"{path / MANIFEST} does not hold a JSON object"
    if manifest.get("format") != _FORMAT or manifest.get("key") != key or manifest.get("stage") != stage:
        return f"{path / MANIFEST} is of another format or key"
    if manifest.get("checksum") != _checksum(manifest):
        return f"{path / MANIFEST} does not have its own checksum: it was changed after it was written"
    return None


def _lineage_damage(path: Path, manifest: dict[str, Any]) -> str | None:
    if not (path / LINEAGE).is_file():
        return f"{path / LINEAGE} is missing"
    if digest_file(path / LINEAGE) != manifest["lineage_sha256"]:
        return f"{path / LINEAGE} does not have the sha256 in its manifest"
    return None


def _doom(folder: Path) -> Path:
    """Take a folder out of sight in one step: a kill while it is deleted leaves no half under its name."""
    doomed = folder.with_name(f".{folder.name.lstrip('.')}.{this_writer()}.doomed")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    return doomed


def _remove(folder: Path) -> None:
    shutil.rmtree(_doom(folder), ignore_errors=True)  # `camera gc` may be deleting it too
