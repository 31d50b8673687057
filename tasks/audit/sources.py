"""The sources of a lineage, hashed again where they still are and where it is safe to look.

A lineage may be a stranger's, and names paths. So only what this project itself has read before is looked at, under the
path that its store says; with `--sources` all else too.
"""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from camera.checkpoints.hub import local_checkpoint
from camera.digests import digest_json
from camera.errors import CameraError, NetworkError
from tasks import versioning
from tasks.audit.finding import Finding, unverifiable, verified, wrong
from tasks.audit.hashing import Evidence, Hashing


def sources(lineage: dict[str, Any], evidence: Evidence) -> Iterator[Finding]:
    """Each source."""
    places = _places(lineage, evidence)
    for digest, entry in lineage["sources"].items():
        if digest != entry["digest"] or digest_json(entry["files"]) != digest:
            yield wrong(f"{entry['name']} {entry['path']}", "its digest is not that of its files")
        else:
            yield _source(entry, places[digest], evidence)


def files_of_sources(lineage: dict[str, Any], evidence: Evidence) -> Iterator[Path]:
    """Their files, as far as they may be looked at."""
    for digest, place in _places(lineage, evidence).items():
        if place is not None:
            yield from (_folder(place) / name for name in lineage["sources"][digest]["files"])


def _places(lineage: dict[str, Any], evidence: Evidence) -> dict[str, Path | None]:
    return {digest: _place(digest, lineage, evidence) for digest in lineage["sources"]}


def _place(digest: str, lineage: dict[str, Any], evidence: Evidence) -> Path | None:
    named = str(lineage["sources"][digest]["path"])
    if evidence.everywhere:
        return _of_hub(named, lineage)
    recorded = evidence.recorded_paths(lineage, digest)
    # A GGUF names of an absolute path the last part alone.
    same = [path for path in recorded if named in (path, Path(path).name)]
    if not same:
        return None
    places = [_of_hub(path, lineage) for path in dict.fromkeys([*same, *recorded])]
    return next(filter(_there, places), places[0])  # moved, and read there too


def _of_hub(named: str, lineage: dict[str, Any]) -> Path:
    """The path that a source is named by; or of a model on the hub, whose path is no folder, its files in the hub's cache."""
    if _there(Path(named)):
        return Path(named)
    beside = (source for source in lineage["sources"].values() if source["path"] == named)
    revision = next((source["revision"] for source in beside if source.get("revision")), None)
    try:  # the tokenizer's entry has no revision of its own
        return local_checkpoint(named, revision, fetch=False)
    except (CameraError, OSError):
        return Path(named)


def _source(entry: dict[str, Any], place: Path | None, evidence: Evidence) -> Finding:
    name = f"{entry['name']} {entry['path']}"
    if place is None:
        detail = "not looked at: this project's store knows nothing read from there; --sources looks"
        return unverifiable(name, detail, "not looked at")
    path = place
    found = _in_workspace(name, path, entry, evidence.hashes)
    version = _dvc(entry, path, evidence) if entry.get("dvc") is not None else None
    if version is None:
        return found
    if found.verdict == "verified":
        found.parts.append(version)
        return found
    if version.verdict != "verified" or not _moved_on(entry, path):
        if found.verdict == "unverifiable":
            found.detail += f"; {version.detail}"
            found.reason = version.reason or found.reason
        return found
    # The workspace holds other data by now, or none: what was read is what DVC kept.
    return verified(name, f"digest {entry['digest'][:12]}, {version.detail}")


def _in_workspace(name: str, path: Path, entry: dict[str, Any], hashes: Hashing) -> Finding:
    if not _there(path):
        return unverifiable(name, f"{path} is not here", "absent")
    folder = _folder(path)
    digests, unread = hashes.read(folder, entry["files"])
    for file, expected in entry["files"].items():
        if file in unread:
            if not _there(folder / file):
                return wrong(name, f"{folder / file} is missing")
            return unverifiable(name, f"{folder / file} cannot be read: {unread[file]}", "unreadable")
        if digests[file] != expected:
            return wrong(name, f"{folder / file} does not have the sha256 it had")
    return verified(name, f"digest {entry['digest'][:12]}")


def _folder(path: Path) -> Path:
    """The folder that a source's files are named from; a source may be a single file."""
    return path if os.path.isdir(path) else path.parent


def _there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long, a folder that may not be read
        return False


def _moved_on(entry: dict[str, Any], path: Path) -> bool:
    """Whether the workspace is not expected to hold what was read: it is gone, or its .dvc file names other data."""
    return not _there(path) or _tracked(path) != entry["dvc"]


def _tracked(path: Path) -> dict[str, str] | None:
    try:
        return versioning.tracked_version(path)
    except CameraError:  # a .dvc file that cannot be read names nothing
        return None


def _dvc(entry: dict[str, Any], path: Path, evidence: Evidence) -> Finding:
    """The version that DVC had, read from its cache or remote unless the workspace has it under the same hash."""
    md5, file = entry["dvc"]["md5"], PurePosixPath(entry["dvc"]["file"])
    root = versioning.repository_root(path if _there(path) else Path.cwd())
    if root is None:
        return unverifiable("DVC version", f"no DVC repository here holds {file}", "absent")
    if _there(path) and _tracked(path) == entry["dvc"] and not evidence.from_remote:
        return verified("DVC version", md5)
    commit = versioning.revision_of(root, str(file), md5)
    place = f"{file} as of revision {commit[:12]}" if commit else f"{file} with {md5}"
    tracked = root / file.with_suffix("")
    try:
        inside = PurePosixPath((Path.cwd() / path).resolve().relative_to(tracked.resolve()))
        found, where = versioning.stored_digests(root, md5, inside, evidence.from_remote)
    except NetworkError as error:
        return unverifiable("DVC version", f"{place}: {error}", "offline")
    except (CameraError, ValueError) as error:
        return unverifiable("DVC version", f"{place}: {error}", "absent")
    for name, expected in entry["files"].items():
        if found.get(name) != expected:
            return wrong("DVC version", f"{place}: {name} in {where} does not have the sha256 it had")
    return verified("DVC version", f"{place}, read from {where}")
