"""Every stage of a lineage, hashed again where its bytes still are, and held against what the stages after it read."""

from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from camera.digests import digest_json
from camera.files import read_json
from tasks.audit.finding import Finding, consistent, heading, unverifiable, verified, wrong
from tasks.audit.hashing import Evidence
from tasks.audit.sources import sources
from tasks.contents import kind
from tasks.store import LINEAGE, MANIFEST, damage_at


def ancestors(lineage: dict[str, Any], evidence: Evidence) -> list[Finding]:
    """The stages, oldest first, and the sources."""
    try:
        stages = [_stage(key, lineage, evidence) for key in _oldest_first(lineage["stages"])]
    except CycleError:
        stages = [wrong("order of the stages", "the lineage was forged: a stage in it descends from itself")]
    return [heading("stages", stages), heading("sources", sources(lineage, evidence))]


def artifact(name: str, entry: dict[str, Any], evidence: Evidence) -> Finding:
    """An artifact of the store, compared with the digest that a lineage names."""
    store, stage, key, digest = evidence.store, entry["stage"], entry["key"], entry["digest"]
    try:
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
    except OSError as error:
        return unverifiable(name, f"{store.path(stage, key)} cannot be read: {error.strerror}", "unreadable")
    return verified(name, f"digest {digest[:12]}")


def folder_of_artifact(path: Path, lineage: dict[str, Any], evidence: Evidence) -> Finding:
    """An artifact's own folder, wherever it lies: against the manifest beside its files, and that against the store.

    Args:
        path: the folder.
        lineage: its lineage.json.
        evidence: of the auditor's own project.
    """
    own = lineage.get("artifact")
    if own is None:
        return wrong("artifact", f"{path} has neither published files nor an artifact's entry in its lineage")
    name = f"{own['step']} {own['key'][:12]}"
    if kind(path / MANIFEST) != "a file":
        return wrong(name, f"{path / MANIFEST} is missing: nothing says which bytes the artifact has")
    try:
        if (damage := damage_at(path, own["stage"], own["key"], evidence.hashes.digests)) is not None:
            return wrong(name, damage)
    except OSError as error:
        return unverifiable(name, f"a file of {path} cannot be read: {error.strerror}", "unreadable")
    manifest = read_json(path / MANIFEST)
    entry = {**own, "digest": manifest["digest"]}
    if (fault := _fault(entry, own["key"], lineage)) is not None:
        return wrong(name, fault)
    if evidence.store.peek(own["stage"], own["key"]) or evidence.store.evicted(own["stage"], own["key"]):
        if (known := evidence.known(entry)) is None:
            return wrong(name, "this store holds another content under its key")
        if known.manifest["checksum"] != manifest["checksum"]:
            another = f"its {MANIFEST} or {LINEAGE} is not the one that this store wrote"
            return consistent(name, f"its files are as in this store, and {another}")
        return verified(name, f"digest {entry['digest'][:12]}, which this store knows")
    return consistent(name, f"as the {MANIFEST} beside it says; this store does not know it")


def _oldest_first(stages: dict[str, Any]) -> list[str]:
    parents = {
        key: [given["key"] for given in entry["inputs"].values() if given["key"] in stages]
        for key, entry in stages.items()
    }
    return list(TopologicalSorter(parents).static_order())


def _stage(key: str, lineage: dict[str, Any], evidence: Evidence) -> Finding:
    entry = lineage["stages"][key]
    name = f"{entry['step']} {key[:12]}"
    if (fault := _fault(entry, key, lineage)) is not None:
        return wrong(name, fault)
    return artifact(name, entry, evidence)


def _fault(entry: dict[str, Any], key: str, lineage: dict[str, Any]) -> str | None:
    """How an entry contradicts itself or what it descends from."""
    asked: dict[str, Any] = {
        "stage": entry["stage"],
        "version": entry["version"],
        **{part: entry[part] for part in ("options", "facts") if part in entry},
        "inputs": {given: value["digest"] for given, value in entry["inputs"].items()},
    }
    if digest_json(asked) != key or entry["key"] != key:
        return "its key is not the digest of its options and inputs"
    for given, value in entry["inputs"].items():
        known = lineage["sources"] if value["key"] is None else lineage["stages"]
        parent = known.get(value["digest"] if value["key"] is None else value["key"])
        if parent is None or parent["digest"] != value["digest"]:
            return f"its input {given} is not in the lineage with that digest"
        if value.get("stage") != (None if value["key"] is None else parent["stage"]):
            return f"its input {given} is of another kind than the lineage says"
    return None
