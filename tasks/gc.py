"""Garbage collection: artifacts that no kept run, published model or running job refers to are evicted.

An evicted artifact keeps its manifest and lineage, so that every lineage can still be walked, and so that a run goes
on from what follows it. Safe beside runs at work: see tasks/lease.py.
"""

import math
import os
import shutil
import time
from collections.abc import Container, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Literal

from camera.errors import CameraError
from camera.files import newest_change
from tasks import runs
from tasks.lease import eviction_lock
from tasks.lineage_form import read_lineage
from tasks.publication import RECORD, read_record
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
    unknown: str = ""
    """Why it is not known what else must stay, so that everything does; nothing if it is known."""
    leased: frozenset[str] = frozenset()
    """The keys of the runs that were at work when this was looked up: they may have published since."""
    begun: float = math.inf
    """When it was looked up, by the clock of the store's disk: what was used later may be referred to since."""

    def reason(self, artifact: Artifact) -> str | None:
        """Why an artifact must stay, or None."""
        return self.keys.get(artifact.key) or self.digests.get(artifact.digest) or self.unknown or None


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
    with eviction_lock(store) as leased, NamedTemporaryFile(dir=store.root, prefix=".gc.") as mark:
        begun = os.fstat(mark.fileno()).st_mtime
    keys: dict[str, str] = {}
    published: set[str] = set()
    unknown = ""
    known = _known_publications(store)
    for path in sorted(store.root.glob(f"{publish.STAGE.name}/*")):
        if path.name.startswith("."):
            continue
        try:
            found = _referred(path, store, known)
        except CameraError as error:
            unknown = f"{path} is damaged, so what it refers to is not known ({error}): run its recipe, or remove it"
            continue
        if found is not None:
            why, descent = found
            keys |= dict.fromkeys([path.name, *descent], why)
            published.update(descent)
    digests = {
        digest: f"run {run.name} of {run.started:%Y-%m-%d}"
        for run in runs.kept_runs(keep_runs)
        for digest in run.digests.values()
    }
    return References(keys, digests, frozenset(published), unknown, frozenset(leased), begun)


def _referred(path: Path, store: Store, known: Container[str]) -> tuple[str, list[str]] | None:
    """Why a publication's ancestors must stay, and their keys; None if nothing that it published stands.

    Raises:
        CameraError: if neither the record in the store nor the published folder says what it refers to.
    """
    record = read_record(path)
    damage = store.damage(publish.STAGE.name, path.name)
    if record.folder is None and damage is None:
        return None
    folder = Path(record.folder or "")
    there = None if record.folder is None else lineage_digest(folder)
    if damage is not None:
        if there is None or there != record.lineage_digest:
            raise CameraError(damage)
        return f"published as {folder}, whose record in the store is damaged", list(_stages(folder))
    if there != record.lineage_digest:
        if not os.path.lexists(folder) or there in known:
            return None  # taken away, or published over
        return f"published as {folder}, which is damaged", list(_stages(path))
    return f"published as {folder}", list(_stages(path))


def _stages(folder: Path) -> dict[str, Any]:
    stages: dict[str, Any] = read_lineage(folder / LINEAGE)["stages"]
    return stages


def _known_publications(store: Store) -> set[str]:
    """The digests of all lineages that this store published."""
    found = {path.stem for path in (store.root / ".published").glob("*.json")}
    for path in store.root.glob(f"{publish.STAGE.name}/*/{RECORD}"):
        with suppress(CameraError):
            found.add(read_record(path.parent).lineage_digest or "")
    return found


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
    entries = list(_used(store))
    before = left = sum(artifact.size_bytes for artifact, _ in entries)
    removed, kept = _leftovers(store, older_than, now, dry_run), dict[str, int]()
    with eviction_lock(store) as now_leased:
        in_use = now_leased | refers.leased  # a first look; each eviction looks again
    for artifact, used in sorted(entries, key=lambda entry: entry[1]):
        intermediate = artifact.stage in STAGES and STAGES[artifact.stage].intermediate
        spared = intermediates and intermediate and artifact.key in refers.published and not refers.unknown
        reason = (
            _IN_USE
            if artifact.key in in_use or used > refers.begun
            else None
            if spared
            else refers.reason(artifact)
        )
        why = "unused for long" if now - used >= older_than else "longest unused, to reach the size"
        if reason is None and now - used < older_than and (max_size is None or left <= max_size):
            reason = "used lately"
        if reason is None and not dry_run and not _evict(store, artifact, used):
            reason = _IN_USE
        if reason is not None:
            kept[reason] = kept.get(reason, 0) + artifact.size_bytes
            continue
        left -= artifact.size_bytes
        name = f"{artifact.manifest.get('step', artifact.stage)} {artifact.key[:12]}"
        why += "; its model is published" if spared else ""
        removed.append(Removal("artifact", name, artifact.size_bytes, now - used, why))
    return Collection(removed, kept, before, left)


def _used(store: Store) -> Iterator[tuple[Artifact, float]]:
    """Every artifact, and when it was last used; another collection may be at work."""
    for artifact in store.all():
        with suppress(OSError):
            yield artifact, (artifact.path / MANIFEST).stat().st_mtime


def _evict(store: Store, artifact: Artifact, used: float) -> bool:
    """Evict one artifact, unless a run makes it, uses it, or used it since it was looked at."""
    with store.try_lock(artifact.key) as free:
        if not free:
            return False
        with eviction_lock(store) as in_use:
            manifest = artifact.path / MANIFEST
            if artifact.key in in_use or not manifest.exists() or manifest.stat().st_mtime != used:
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
        with store.try_lock(folder.name.removeprefix(".").removesuffix(".working")) as free:
            removal = _removal("unfinished", folder, now, "a killed stage that no run resumed")
            if free and removal.unused_seconds >= older_than:
                found.append(removal)
                if not dry_run:
                    shutil.rmtree(folder, ignore_errors=True)
                    # Beside it stands of which files it was made.
                    folder.with_name(f"{folder.name}.json").unlink(missing_ok=True)
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
        with suppress(OSError):  # a run may be at work in it
            size += path.lstat().st_size if path.is_file() else 0
    unused = max(now - newest_change(folder), 0)
    return Removal(kind, f"{folder.parent.name}/{folder.name}", size, unused, why)
