"""Every stage of a lineage and every source, hashed again where its bytes still are."""

from graphlib import CycleError, TopologicalSorter
from pathlib import Path, PurePosixPath
from typing import Any

from camera.digests import digest_json
from camera.errors import CameraError, NetworkError
from tasks import versioning
from tasks.audit.finding import Finding, heading, unverifiable, verified, wrong
from tasks.audit.hashing import Evidence, Hashing, source_folder


def ancestors(lineage: dict[str, Any], evidence: Evidence) -> list[Finding]:
    """The stages, oldest first, and the sources.

    Raises:
        CameraError: if a stage descends from itself.
    """
    keys = _oldest_first(lineage["stages"])
    stages = [_stage(key, lineage, evidence) for key in keys]
    sources = [_source(entry, evidence) for entry in lineage["sources"].values()]
    return [heading("stages", stages), heading("sources", sources)]


def artifact(name: str, entry: dict[str, Any], evidence: Evidence) -> Finding:
    """An artifact of the store, compared with the digest that a lineage names."""
    store, stage, key, digest = evidence.store, entry["stage"], entry["key"], entry["digest"]
    if (gone := store.evicted(stage, key)) is not None:
        if gone.digest != digest:
            return wrong(name, f"evicted; its manifest names another content, {gone.digest[:12]}")
        return unverifiable(name, "evicted by `camera gc`; its manifest names this digest", "evicted")
    if not store.path(stage, key).exists():
        return unverifiable(name, "not in this store: made elsewhere, or the store was deleted", "absent")
    if (damage := store.damage(stage, key, evidence.hashes.digests)) is not None:
        return wrong(name, damage)
    if store.open(stage, key).digest != digest:
        return wrong(name, f"the store holds another content under this key, made later: {stage}/{key}")
    return verified(name, f"digest {digest[:12]}")


def _oldest_first(stages: dict[str, Any]) -> list[str]:
    parents = {
        key: [given["key"] for given in entry["inputs"].values() if given["key"] in stages]
        for key, entry in stages.items()
    }
    try:
        return list(TopologicalSorter(parents).static_order())
    except CycleError:
        raise CameraError("the lineage was forged: a stage in it descends from itself") from None


def _stage(key: str, lineage: dict[str, Any], evidence: Evidence) -> Finding:
    entry = lineage["stages"][key]
    name = f"{entry['step']} {key[:12]}"
    asked: dict[str, Any] = {
        "stage": entry["stage"],
        "version": entry["version"],
        **{part: entry[part] for part in ("options", "facts") if part in entry},
        "inputs": {given: value["digest"] for given, value in entry["inputs"].items()},
    }
    if digest_json(asked) != key or entry["key"] != key:
        return wrong(name, "its key is not the digest of its options and inputs")
    for given, value in entry["inputs"].items():
        known = lineage["sources"] if value["key"] is None else lineage["stages"]
        parent = known.get(value["digest"] if value["key"] is None else value["key"])
        if parent is None or parent["digest"] != value["digest"]:
            return wrong(name, f"its input {given} is not in the lineage with that digest")
    return artifact(name, entry, evidence)


def _source(entry: dict[str, Any], evidence: Evidence) -> Finding:
    path = Path(entry["path"])
    name = f"{entry['name']} {entry['path']}"
    if digest_json(entry["files"]) != entry["digest"]:
        return wrong(name, "its digest is not that of its files")
    found = _in_workspace(name, path, entry, evidence.hashes)
    version = _dvc(entry, path, evidence) if "dvc" in entry else None
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
    if not path.exists():
        return unverifiable(name, f"{path} is not here", "absent")
    folder = source_folder(path)
    for file in entry["files"]:
        if not (folder / file).is_file():
            return wrong(name, f"{folder / file} is missing")
    for file, found in hashes.digests(folder, entry["files"]).items():
        if found != entry["files"][file]:
            return wrong(name, f"{folder / file} does not have the sha256 it had")
    return verified(name, f"digest {entry['digest'][:12]}")


def _moved_on(entry: dict[str, Any], path: Path) -> bool:
    """Whether the workspace is not expected to hold what was read: it is gone, or its .dvc file names other data."""
    return not path.exists() or versioning.tracked_version(path) != entry["dvc"]


def _dvc(entry: dict[str, Any], path: Path, evidence: Evidence) -> Finding:
    """The version that DVC had, read from its cache or remote unless the workspace has it under the same hash."""
    md5, file = entry["dvc"]["md5"], PurePosixPath(entry["dvc"]["file"])
    root = versioning.repository_root(path if path.exists() else Path.cwd())
    if root is None:
        return unverifiable("DVC version", f"no DVC repository here holds {file}", "absent")
    if path.exists() and versioning.tracked_version(path) == entry["dvc"] and not evidence.from_remote:
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
