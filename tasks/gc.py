"""Making room in the store: what no kept run, published model or running job refers to is evicted.

An evicted artifact keeps its manifest and lineage, so that every lineage can still be walked, and so that a run goes
on from what follows it. Safe beside runs at work: see tasks/lease.py.
"""

import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from camera.digests import digest_json
from camera.errors import CameraError
from camera.files import read_json
from tasks import runs
from tasks.lease import nothing_new
from tasks.stages import publish
from tasks.store import LINEAGE, MANIFEST, Artifact, Store

INTERMEDIATE = ("fetch", "capture", "score", "prune", "save", "quantize", "convert")
"""Stages whose artifacts nobody reads once the model is published: measurements and records stay."""
Kind = Literal["artifact", "unfinished", "leftover"]


@dataclass(frozen=True)
class References:
    """What must stay, and because of what."""

    keys: dict[str, str] = field(default_factory=dict)
    """Of the artifacts that a published model descends from."""
    digests: dict[str, str] = field(default_factory=dict)
    """Of the artifacts that a kept run recorded."""
    published: frozenset[str] = frozenset()
    """Those of the keys whose published folder stands, so that their intermediates can be spared."""

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
    standing: set[str] = set()
    for artifact in _artifacts(store, publish.STAGE.name):
        with suppress(CameraError):  # a record that cannot be read publishes nothing
            record = read_json(artifact.path / publish.RECORD)
            if record["folder"] is None or not _stands(Path(record["folder"]), record["lineage_digest"]):
                continue
            why = f"published as {record['folder']}"
            descent = read_json(artifact.path / LINEAGE)["stages"]
            keys |= dict.fromkeys([artifact.key, *descent], why)
            standing.update(descent)
    digests = {
        digest: f"run {run.name} of {run.started:%Y-%m-%d}"
        for run in runs.kept_runs(keep_runs)
        for digest in run.digests.values()
    }
    return References(keys, digests, frozenset(standing))


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
        older_than: what was not used for so many seconds goes.
        max_size: bytes; while the store is larger, younger things go too.
        intermediates: also what published models descend from and no longer need.
        dry_run: only say what would go.
    """
    now = time.time()
    entries = [(artifact, _last_used(artifact)) for artifact in _artifacts(store)]
    before = left = sum(artifact.size_bytes for artifact, _ in entries)
    removed, kept = _leftovers(store, older_than, now, dry_run), dict[str, int]()
    with nothing_new(store) as in_use:
        pass  # a first look; each eviction looks again
    for artifact, used in sorted(entries, key=lambda entry: entry[1]):
        spared = intermediates and artifact.stage in INTERMEDIATE and artifact.key in refers.published
        reason = "in use by a run at work" if artifact.key in in_use else refers.reason(artifact)
        if reason is not None and not (spared and artifact.key not in in_use):
            kept[reason] = kept.get(reason, 0) + artifact.size_bytes
            continue
        if now - used >= older_than:
            why = "unused for long"
        elif max_size is not None and left > max_size:
            why = "longest unused, to reach the size"
        else:
            kept["used lately"] = kept.get("used lately", 0) + artifact.size_bytes
            continue
        if spared:
            why += "; its model is published"
        if not dry_run and not _evict(store, artifact):
            kept["in use by a run at work"] = kept.get("in use by a run at work", 0) + artifact.size_bytes
            continue
        left -= artifact.size_bytes
        step = str(artifact.manifest.get("step", artifact.stage))
        removed.append(
            Removal("artifact", f"{step} {artifact.key[:12]}", artifact.size_bytes, now - used, why)
        )
    return Collection(removed, kept, before, left)


def _evict(store: Store, artifact: Artifact) -> bool:
    """Evict one artifact, unless somebody makes it or uses it."""
    with store.lock_if_free(artifact.key) as free:
        if not free:
            return False
        with nothing_new(store) as in_use:
            if artifact.key in in_use or not artifact.path.exists():
                return False
            doomed = store.evict(artifact.stage, artifact.key)
    shutil.rmtree(doomed, ignore_errors=True)
    return True


def _leftovers(store: Store, older_than: float, now: float, dry_run: bool) -> list[Removal]:
    """What killed processes left behind: folders half deleted, work that nobody went on with, locks that nobody holds."""
    found: list[Removal] = []
    for folder in sorted(store.root.glob("*/.*.doomed")):
        found.append(_removal("leftover", folder, now, "half deleted"))
        if not dry_run:
            shutil.rmtree(folder, ignore_errors=True)
    for folder in sorted(store.root.glob("*/.*.working")):
        key = folder.name.removeprefix(".").removesuffix(".working")
        removal = _removal("unfinished", folder, now, "a killed stage that nobody went on with")
        if removal.unused_seconds < older_than:
            continue
        with store.lock_if_free(key) as free:
            if free:
                found.append(removal)
                if not dry_run:
                    shutil.rmtree(folder, ignore_errors=True)
    locks = sorted((store.root / ".locks").glob("*"))
    unheld = 0
    for path in locks:
        if now - path.stat().st_mtime >= older_than:
            if not dry_run:
                with store.lock_if_free(path.name) as free:
                    unheld += free
            else:
                unheld += 1
    if unheld:
        found.append(Removal("leftover", f"{unheld} lock files", 0, older_than, "nobody holds them"))
    return found


def _removal(kind: Kind, folder: Path, now: float, why: str) -> Removal:
    size, newest = 0, 0.0
    with suppress(FileNotFoundError):
        newest = folder.stat().st_mtime
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # somebody may be at work in it
            about = path.stat()
            newest = max(newest, about.st_mtime)
            size += about.st_size if path.is_file() else 0
    return Removal(kind, f"{folder.parent.name}/{folder.name}", size, max(now - newest, 0), why)


def _artifacts(store: Store, stage: str = "*") -> Iterator[Artifact]:
    for manifest in sorted(store.root.glob(f"{stage}/*/{MANIFEST}")):
        kind, key = manifest.parent.parent.name, manifest.parent.name
        if not kind.startswith(".") and not key.startswith("."):
            artifact = store.glance(kind, key)
            if artifact is not None:
                yield artifact


def _last_used(artifact: Artifact) -> float:
    return (artifact.path / MANIFEST).stat().st_mtime


def _stands(folder: Path, lineage_digest: str) -> bool:
    """Whether a folder holds a publication still, by its lineage; its other files are the audit's matter."""
    try:
        lineage: dict[str, Any] = read_json(folder / LINEAGE)
    except CameraError:
        return False
    body = {name: value for name, value in lineage.items() if name != "digest"}
    return bool(lineage.get("digest") == lineage_digest == digest_json(body))
