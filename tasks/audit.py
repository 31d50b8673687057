"""The audit: walk a lineage back from what was published, and hash again all that is still there.

Three answers, kept apart: a part is right, it is wrong, or it could not be verified here (and why).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, Literal

from camera.digests import digest_file, digest_json
from camera.errors import CameraError
from camera.files import read_json
from camera.formats.gguf_reader import open_gguf
from tasks import tracking, versioning
from tasks.lineage import check_lineage, portable
from tasks.stages import publish
from tasks.store import LINEAGE, MANIFEST, Store

GGUF_KEY = "camera.lineage"
Verdict = Literal["ok", "wrong", "unverified"]


@dataclass
class Finding:
    """One part of a lineage, what was found of it, and its parts."""

    name: str
    verdict: Verdict
    detail: str = ""
    parts: list["Finding"] = field(default_factory=list)

    def walk(self) -> Iterator["Finding"]:
        """This and all below it."""
        yield self
        for part in self.parts:
            yield from part.walk()

    def all_of(self, verdict: Verdict) -> list["Finding"]:
        """What below has this verdict."""
        return [finding for finding in self.walk() if finding.verdict == verdict]


def audit(path: Path, store: Store) -> Finding:
    """Verify a published folder, a GGUF file or an artifact folder back to its sources.

    Args:
        path: what to audit.
        store: where intermediate artifacts may still be.

    Raises:
        CameraError: if there is no lineage to walk.
    """
    if path.is_file():
        return _audit_gguf(path, store)
    if not path.is_dir():
        raise CameraError(f"{path} does not exist: give a published folder, a GGUF file or an artifact")
    if not (path / LINEAGE).is_file():
        raise CameraError(
            f"{path} has no {LINEAGE}: it was not made by this pipeline, so nothing can be audited"
        )
    lineage = check_lineage(read_json(path / LINEAGE), str(path / LINEAGE))
    root = Finding(str(path), "ok")
    if "files" in lineage:
        root.parts += _published(path, lineage)
    elif (path / MANIFEST).is_file():
        manifest = read_json(path / MANIFEST)
        root.parts.append(
            _artifact(Store(path.parent.parent), manifest["stage"], manifest["key"], manifest["digest"])
        )
    root.parts += _ancestors(lineage, store)
    return root


def _audit_gguf(path: Path, store: Store) -> Finding:
    embedded = _embedded(path)
    if embedded is None:
        raise CameraError(f"{path} holds no lineage ({GGUF_KEY}): it was not published by this pipeline")
    root = Finding(str(path), "ok")
    beside = path.parent / LINEAGE
    published = check_lineage(read_json(beside), str(beside)) if beside.is_file() else {}
    if "files" in published:
        expected = published["files"].get(path.name)
        right = expected == digest_file(path)
        detail = f"sha256 as in {beside}" if right else f"sha256 is not the one in {beside}"
        root.parts.append(Finding("bytes of the file", "ok" if right else "wrong", detail))
    else:
        root.parts.append(Finding("bytes of the file", *_bytes_in_store(path, store)))
    root.parts += _ancestors(embedded, store)
    return root


def _bytes_in_store(path: Path, store: Store) -> tuple[Verdict, str]:
    found = digest_file(path)
    for manifest_path in sorted(store.root.glob(f"convert/*/{MANIFEST}")):
        manifest = read_json(manifest_path)
        if any(entry["sha256"] == found for entry in manifest["files"].values()):
            return "ok", f"sha256 as in {manifest_path}"
    return "unverified", "no lineage.json beside it, and no artifact of this store has these bytes"


def _published(path: Path, lineage: dict[str, Any]) -> list[Finding]:
    damage = publish.damage(path)
    findings = [
        Finding(f"{len(lineage['files'])} published files", "wrong" if damage else "ok", damage or "")
    ]
    for name in lineage["files"]:
        if not name.endswith(".gguf") or not (path / name).is_file():
            continue
        try:
            embedded = _embedded(path / name)
        except CameraError as error:
            findings.append(Finding(f"lineage inside {name}", "wrong", str(error)))
            continue
        agrees = embedded is not None and all(
            portable(lineage)["stages"].get(key) == entry for key, entry in embedded["stages"].items()
        )
        detail = "" if agrees else "does not agree with lineage.json"
        findings.append(Finding(f"lineage inside {name}", "ok" if agrees else "wrong", detail))
    findings.append(_dvc(path))
    findings += _mlflow(lineage)
    return findings


def _embedded(path: Path) -> dict[str, Any] | None:
    text = open_gguf(path).metadata.get(GGUF_KEY)
    if text is None:
        return None
    try:
        return check_lineage(json.loads(text), f"{GGUF_KEY} in {path}")
    except json.JSONDecodeError:
        raise CameraError(f"{path}: {GGUF_KEY} is not JSON") from None


def _dvc(path: Path) -> Finding:
    file = path.with_name(path.name + ".dvc")
    if not file.is_file():
        return Finding("DVC version", "unverified", f"there is no {file.name}")
    try:
        difference = versioning.verify(file)
    except CameraError as error:
        return Finding("DVC version", "unverified", str(error))
    return Finding("DVC version", "ok" if difference is None else "wrong", difference or file.name)


def _mlflow(lineage: dict[str, Any]) -> list[Finding]:
    run_id = lineage["references"].get("mlflow_run")
    if run_id is None:
        return [Finding("MLflow run", "unverified", "the run was not tracked")]
    tags = tracking.find_run(run_id)
    if tags is None:
        return [Finding("MLflow run", "unverified", f"{run_id} is not in the tracking database in use")]
    digests = {value for name, value in tags.items() if name.startswith("camera.digest.")}
    strangers = [entry["step"] for entry in lineage["stages"].values() if entry["digest"] not in digests]
    run = Finding("MLflow run", "wrong" if strangers else "ok", run_id)
    if strangers:
        run.detail = f"{run_id} recorded other digests for {', '.join(strangers)}"
    version = tracking.find_version(lineage["name"], lineage["digest"])
    registered = Finding(
        "MLflow registry",
        "unverified" if version is None else "ok",
        "no version has this lineage digest" if version is None else f"version {version}",
    )
    return [run, registered]


def _ancestors(lineage: dict[str, Any], store: Store) -> list[Finding]:
    stages = Finding("stages", "ok")
    for key in _oldest_first(lineage["stages"]):
        stages.parts.append(_stage(key, lineage["stages"][key], lineage, store))
    sources = Finding("sources", "ok")
    for entry in lineage["sources"].values():
        sources.parts.append(_source(entry))
    return [stages, sources]


def _oldest_first(stages: dict[str, Any]) -> list[str]:
    parents = {
        key: [given["key"] for given in entry["inputs"].values() if given["key"] in stages]
        for key, entry in stages.items()
    }
    try:
        return list(TopologicalSorter(parents).static_order())
    except CycleError:
        raise CameraError("the lineage was forged: a stage in it descends from itself") from None


def _stage(key: str, entry: dict[str, Any], lineage: dict[str, Any], store: Store) -> Finding:
    name = f"{entry['step']} {key[:12]}"
    inputs = {given: value["digest"] for given, value in entry["inputs"].items()}
    asked = {
        "stage": entry["stage"],
        "version": entry["version"],
        "options": entry["options"],
        "inputs": inputs,
    }
    if digest_json(asked) != key or entry["key"] != key:
        return Finding(name, "wrong", "its key is not the digest of its options and inputs")
    for given, value in entry["inputs"].items():
        known = lineage["sources"] if value["key"] is None else lineage["stages"]
        parent = known.get(value["digest"] if value["key"] is None else value["key"])
        if parent is None or parent["digest"] != value["digest"]:
            return Finding(name, "wrong", f"its input {given} is not in the lineage with that digest")
    return _artifact(store, entry["stage"], key, entry["digest"], name)


def _artifact(store: Store, stage: str, key: str, digest: str, name: str | None = None) -> Finding:
    name = name or f"{stage} {key[:12]}"
    if not store.path(stage, key).exists():
        return Finding(name, "unverified", "not in this store (evicted, or made elsewhere)")
    if (damage := store.damage(stage, key)) is not None:
        return Finding(name, "wrong", damage)
    if store.open(stage, key).digest != digest:
        return Finding(
            name, "wrong", f"the store holds another content under this key, made later: {stage}/{key}"
        )
    return Finding(name, "ok", f"digest {digest[:12]}")


def _source(entry: dict[str, Any]) -> Finding:
    path = Path(entry["path"])
    name = f"{entry['name']} {entry['path']}"
    if digest_json(entry["files"]) != entry["digest"]:
        return Finding(name, "wrong", "its digest is not that of its files")
    if not path.exists():
        tracked = f"; DVC has it as {entry['dvc']['file']}" if "dvc" in entry else ""
        return Finding(name, "unverified", f"{path} is not here{tracked}")
    for file, expected in entry["files"].items():
        place = path / file if path.is_dir() else path
        if not place.is_file():
            return Finding(name, "wrong", f"{place} is missing")
        if digest_file(place) != expected:
            return Finding(name, "wrong", f"{place} does not have the sha256 it had")
    finding = Finding(name, "ok", f"digest {entry['digest'][:12]}")
    if "dvc" in entry:
        now = versioning.tracked_version(path)
        same = now == entry["dvc"]
        detail = entry["dvc"]["md5"] if same else f"was {entry['dvc']}, is {now}"
        finding.parts.append(Finding("DVC version", "ok" if same else "wrong", detail))
    return finding
