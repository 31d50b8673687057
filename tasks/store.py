"""The artifact store: content-addressed folders that are whole and verified, or do not exist.

<store>/<stage>/<key>/            an artifact, with manifest.json and lineage.json beside its files
<store>/<stage>/.<key>.working/   the same being made; a killed stage resumes in it
<store>/.locks/<key>              held (flock) by the process that makes it
"""

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from camera.digests import digest_file, digest_files, digest_json, files_below
from camera.errors import CameraError
from camera.files import read_json, sync, sync_tree, write_json

MANIFEST = "manifest.json"
LINEAGE = "lineage.json"
_FORMAT = 1
_NOT_CONTENT = (MANIFEST, LINEAGE)


@dataclass(frozen=True)
class Artifact:
    """One finished folder of the store."""

    path: Path
    manifest: dict[str, Any]

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
        if not (path / MANIFEST).is_file():
            return None
        return None if self.damage(stage, key) else self.open(stage, key)

    def glance(self, stage: str, key: str) -> Artifact | None:
        """The artifact if its manifest is whole, else None. Its bytes are not looked at: for estimates only."""
        return None if self._manifest_damage(stage, key) else self.open(stage, key)

    def open(self, stage: str, key: str) -> Artifact:
        """An artifact that was verified a moment ago."""
        path = self.path(stage, key)
        return Artifact(path, read_json(path / MANIFEST))

    def damage(self, stage: str, key: str) -> str | None:
        """What is wrong with an artifact that is there, in words, or None. Hashes every byte."""
        path = self.path(stage, key)
        if not path.exists():
            return None
        if (damage := self._manifest_damage(stage, key)) is not None:
            return damage
        manifest = read_json(path / MANIFEST)
        if not (path / LINEAGE).is_file():
            return f"{path / LINEAGE} is missing"
        if digest_file(path / LINEAGE) != manifest["lineage_sha256"]:
            return f"{path / LINEAGE} does not have the sha256 in its manifest"
        expected = {name: entry["sha256"] for name, entry in manifest["files"].items()}
        present = [name for name in files_below(path) if name not in _NOT_CONTENT]
        for name in sorted(set(expected) ^ set(present)):
            return f"{path / name} is {'missing' if name in expected else 'not part of the artifact'}"
        for name, found in digest_files(path, present).items():
            if found != expected[name]:
                return f"{path / name} does not have the sha256 in its manifest"
        if digest_json(expected) != manifest["digest"]:
            return f"{path / MANIFEST} does not have the digest of its files"
        return None

    def _manifest_damage(self, stage: str, key: str) -> str | None:
        path = self.path(stage, key)
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

    @contextmanager
    def lock(self, key: str, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Hold a key alone, across threads and processes; the kernel frees it when the holder dies."""
        folder = self.root / ".locks"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / key).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

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
        return self.open(stage, key)


def _checksum(manifest: dict[str, Any]) -> str:
    """Digest of all that a manifest says, so that no field of it can change unseen."""
    return digest_json({name: value for name, value in manifest.items() if name != "checksum"})


def _sweep(folder: Path) -> None:
    """Delete the temporaries of a killed process: no later one knows their names, and they would become content."""
    for path in folder.rglob(".*.tmp"):
        if path.is_file():
            path.unlink()


def _remove(folder: Path) -> None:
    """Take a folder out of sight in one step, then delete it: a kill in between leaves no half under its name."""
    doomed = folder.with_name(f".{folder.name.lstrip('.')}.{os.getpid()}.doomed")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)
