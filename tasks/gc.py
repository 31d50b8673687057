"""Garbage collection: artifacts that no kept run, published model or running job refers to are evicted.

An evicted artifact keeps its manifest and lineage, so that every lineage can still be walked, and so that a run goes
on from what follows it. Safe beside runs at work: see tasks/lease.py.
"""

import shutil
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from camera.errors import CameraError
from camera.files import newest_change, read_json
from tasks import runs
from tasks.lease import eviction_lock
from tasks.registry import lineage_digest
from tasks.stage import STAGES
from tasks.stages import publish
from tasks.store import LINEAGE, MANIFEST, Artifact, Store

_IN_USE = "in use by a run at work"
Kind = Literal["artifact", "unfinished", "leftover"]


@dataclass(frozen=True)
class References:
    """What must stay, and because of what."""

    keys: dict[str, str] = field(default_factory=dict)
    """Of the artifacts that a published model descends from."""
    digests: dict[str, str] = field(default_factory=dict)
    """Of the artifacts that a kept run recorded."""
    published: frozenset[str] = frozenset()
    """Those of the keys that a published folder descends from, so that their intermediates can go."""

    def reason(self, artifact: Artifact) -> str | None:
        """Why an artifact must stay, or None."""
        return self.keys.get(artifact.key) or self.digests.get(artifact.digest)


@dataclass(frozen=True)
class Removal:
    """One thing that goes."""

    kind: Kind
    name: str
    size_bytes: int
    unused_seconds: float
    why: str


@dataclass(frozen=True)
class Collection:
    """What a collection did, or would do."""

    removed: list[Removal]
    kept: dict[str, int]
    """Bytes that stay, by the reason."""
    size_before: int
    size_after: int


def references(store: Store, keep_runs: float) -> References:
    """What published models and kept runs refer to.

    Args:
        store: the artifact store.
        keep_runs: a run is kept if it was at work in the last so many seconds, or has the tag `camera.keep`.

    Raises:
        NetworkError: if MLflow cannot be asked: what its runs refer to must not be guessed.
    """
    keys: dict[str, str] = {}
    published: set[str] = set()
    for artifact in store.all(publish.STAGE.name):
        with suppress(CameraError):  # a record that cannot be read publishes nothing
            record = read_json(artifact.path / publish.RECORD)
            folder = record["folder"]
            if folder is None or lineage_digest(Path(folder)) != record["lineage_digest"]:
                continue
            why = f"published as {folder}"
            descent = read_json(artifact.path / LINEAGE)["stages"]
            keys |= dict.fromkeys([artifact.key, *descent], why)
            published.update(descent)
    digests = {
        digest: f"run {run.name} of {run.started:%Y-%m-%d}"
        for run in runs.kept_runs(keep_runs)
        for digest in run.digests.values()
    }
    return References(keys, digests, frozenset(published))


def collect(
    store: Store,
    refers: References,
    *,
    older_than: float,
    max_size: int | None = None,
    intermediates: bool = False,
    dry_run: bool = False,
) -> Collection:
    """Evict what may go, the longest unused first.

    Args:
        store: the artifact store.
        refers: what must stay.
        older_than: seconds without use after which an artifact goes.
        max_size: bytes; while the store is larger, younger artifacts go too.
        intermediates: also what published models descend from and no longer need.
        dry_run: only say what would go.
    """
    now = time.time()
    entries = [(artifact, (artifact.path / MANIFEST).stat().st_mtime) for artifact in store.all()]
    before = left = sum(artifact.size_bytes for artifact, _ in entries)
    removed, kept = _leftovers(store, older_than, now, dry_run), dict[str, int]()
    with eviction_lock(store) as in_use:
        pass  # a first look; each eviction looks again
    for artifact, used in sorted(entries, key=lambda entry: entry[1]):
        intermediate = artifact.stage in STAGES and STAGES[artifact.stage].intermediate
        spared = intermediates and intermediate and artifact.key in refers.published
        reason = _IN_USE if artifact.key in in_use else None if spared else refers.reason(artifact)
        why = "unused for long" if now - used >= older_than else "longest unused, to reach the size"
        if reason is None and now - used < older_than and (max_size is None or left <= max_size):
            reason = "used lately"
        if reason is None and not dry_run and not _evict(store, artifact):
            reason = _IN_USE
        if reason is not None:
            kept[reason] = kept.get(reason, 0) + artifact.size_bytes
            continue
        left -= artifact.size_bytes
        name = f"{artifact.manifest.get('step', artifact.stage)} {artifact.key[:12]}"
        why += "; its model is published" if spared else ""
        removed.append(Removal("artifact", name, artifact.size_bytes, now - used, why))
    return Collection(removed, kept, before, left)


def _evict(store: Store, artifact: Artifact) -> bool:
    """Evict one artifact, unless a run makes it or uses it."""
    with store.try_lock(artifact.key) as free:
        if not free:
            return False
        with eviction_lock(store) as in_use:
            if artifact.key in in_use or not artifact.path.exists():
                return False
            hidden = store.evict(artifact.stage, artifact.key)
    shutil.rmtree(hidden, ignore_errors=True)
    return True


def _leftovers(store: Store, older_than: float, now: float, dry_run: bool) -> list[Removal]:
    """What killed processes left: folders half deleted, working folders that no run resumed, lock files."""
    found: list[Removal] = []
    for folder in sorted(store.root.glob("*/.*.doomed")):
        found.append(_removal("leftover", folder, now, "half deleted"))
        if not dry_run:
            shutil.rmtree(folder, ignore_errors=True)
    for folder in sorted(store.root.glob("*/.*.working")):
        removal = _removal("unfinished", folder, now, "a killed stage that no run resumed")
        if removal.unused_seconds < older_than:
            continue
        with store.try_lock(folder.name.removeprefix(".").removesuffix(".working")) as free:
            if free:
                found.append(removal)
                if not dry_run:
                    shutil.rmtree(folder, ignore_errors=True)
    unheld = 0
    for path in sorted((store.root / ".locks").glob("*")):
        if now - newest_change(path) >= older_than:
            if dry_run:
                unheld += 1
            else:
                with store.try_lock(path.name) as free:
                    unheld += free
    if unheld:
        found.append(Removal("leftover", f"{unheld} lock files", 0, older_than, "nobody holds them"))
    return found


def _removal(kind: Kind, folder: Path, now: float, why: str) -> Removal:
    size = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # a run may be at work in it
            size += path.stat().st_size if path.is_file() else 0
    unused = max(now - newest_change(folder), 0)
    return Removal(kind, f"{folder.parent.name}/{folder.name}", size, unused, why)
