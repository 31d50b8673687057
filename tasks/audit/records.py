"""Who else recorded a publication: the store, MLflow's run, its registry, DVC."""

import hashlib
import os
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from camera.digests import canonical_json
from camera.errors import CameraError, NetworkError
from tasks import registry, runs, versioning
from tasks.audit.finding import Finding, consistent, unverifiable, verified, wrong
from tasks.audit.hashing import Hashing
from tasks.contents import contents, kind, place
from tasks.publication import read_record
from tasks.runs import flatten, mlflow_name, parameter
from tasks.signed import record_of, records
from tasks.store import LINEAGE, Store


def dvc(folder: Path, hashes: Hashing, from_remote: bool, recorded: str | None) -> Finding | None:
    """The .dvc file beside a published folder, compared with the folder, and if asked with the remote.

    Args:
        folder: what is published.
        hashes: what hashes.
        from_remote: whether to read the remote again.
        recorded: DVC's hash, as this store recorded it when it published here; None if it did not.

    Returns:
        None where there is no such file, and none was recorded.
    """
    file = folder.with_name(folder.name + ".dvc")
    if (what := kind(file)) != "a file":
        if what is not None:
            return wrong("DVC version", f"{file.name} is {what}")
        if recorded is not None:
            return unverifiable("DVC version", f"{file.name} is gone; {recorded} was recorded", "absent")
        return None
    try:
        md5 = versioning.md5_of(file)
    except CameraError as error:
        return wrong("DVC version", str(error))
    if recorded not in (None, md5):
        return wrong("DVC version", f"{file.name} names {md5}, and {recorded} was recorded")
    try:
        difference = versioning.verify(file)
    except CameraError as error:
        return unverifiable("DVC version", str(error), "absent")
    if difference is not None:
        return wrong("DVC version", difference)
    kept = versioning.listed(folder, md5)
    if kept is not None and kept.get(LINEAGE) != _md5(folder / LINEAGE):
        return wrong("DVC version", f"{file.name} {md5} has another {LINEAGE}")
    finding = verified("DVC version", f"{file.name} {md5}")
    if from_remote:
        finding.parts.append(_remote(folder, file, hashes))
    return finding


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def _remote(folder: Path, file: Path, hashes: Hashing) -> Finding:
    root = versioning.repository_root(folder)
    assert root is not None  # `verify` went through
    try:
        found, where = versioning.stored_digests(root, versioning.md5_of(file), PurePosixPath(), True)
    except NetworkError as error:
        return unverifiable("DVC remote", str(error), "offline")
    except CameraError as error:
        return unverifiable("DVC remote", str(error), "absent")
    expected, _ = hashes.read(folder, contents(folder)[0])
    differ = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if differ:
        return wrong("DVC remote", f"{', '.join(differ)} in {where} is not what is published")
    return verified("DVC remote", f"{len(found)} files read again from {where}")


def mlflow_run(lineage: dict[str, Any]) -> Finding | None:
    """The run: the digests of its artifacts, its source model, and its recipe; None if it was not tracked."""
    try:
        run_id = lineage["references"].get("mlflow_run") or _registered_run(lineage)
        if run_id is None:
            return None
        run = runs.find_run(run_id)
    except NetworkError as error:
        return unverifiable("MLflow run", str(error), "offline")
    if run is None:
        return unverifiable("MLflow run", f"{run_id} is not in the tracking database in use", "absent")
    # One step may stand for several stages: other options can give the same bytes, which then have both ancestries.
    steps: dict[str, set[str]] = {}
    for entry in lineage["stages"].values():
        steps.setdefault(mlflow_name(entry["step"]), set()).add(entry["digest"])
    others = [step for step, digests in steps.items() if run.digests.get(step) not in {*digests, None}]
    if others:
        return wrong("MLflow run", f"{run_id} recorded other digests for {', '.join(others)}")
    source = run.tags.get("camera.source_digest")
    if source is not None and source not in lineage["sources"]:
        return wrong("MLflow run", f"{run_id} recorded another source model")
    asked = dict(parameter(name, value) for name, value in flatten(lineage["recipe"]).items())
    differ = [name for name, value in asked.items() if run.parameters.get(name, value) != value]
    if differ:
        return wrong("MLflow run", f"{run_id} recorded another recipe: {', '.join(sorted(differ))}")
    if unknown := sorted(steps.keys() - run.digests.keys()):
        return unverifiable("MLflow run", f"{run_id} has no record of {', '.join(unknown)}", "untracked")
    return verified("MLflow run", run_id)


def _registered_run(lineage: dict[str, Any]) -> str | None:
    """The run that the registry names, for a model published while MLflow was away and registered later."""
    known = registry.versions(lineage["name"])
    return next((entry.run_id for entry in known if entry.lineage_digest == lineage["digest"]), None)


def mlflow_registry(lineage: dict[str, Any], folder: Path, dvc_file: Path) -> Finding:
    """The registry's version of this lineage: its tags.

    Args:
        lineage: what is published.
        folder: where.
        dvc_file: what names the DVC version of what was read.
    """
    name = "MLflow registry"
    try:
        known = registry.versions(lineage["name"])
    except NetworkError as error:
        return unverifiable(name, str(error), "offline")
    version = next((entry for entry in known if entry.lineage_digest == lineage["digest"]), None)
    if version is None:
        run = lineage["references"].get("mlflow_run")
        for entry in known:
            if run is not None and entry.run_id == run and entry.folder == place(folder):
                return wrong(
                    name, f"version {entry.number} is of the same run and folder, and names another lineage"
                )
        return unverifiable(name, "no version has this lineage digest", "untracked")
    aliases = f" ({', '.join(version.aliases)})" if version.aliases else ""
    ggufs = {file: digest for file, digest in lineage["files"].items() if file.endswith(".gguf")}
    if version.gguf_digests != ggufs:
        return wrong(name, f"version {version.number}{aliases} names other GGUF digests")
    if not _same_lineage(version, lineage):
        return wrong(name, f"version {version.number}{aliases} holds another lineage")
    if version.dvc_md5 and dvc_file.is_file() and not _names(dvc_file, version.dvc_md5):
        return wrong(
            name, f"version {version.number}{aliases} names another DVC version than {dvc_file.name}"
        )
    return verified(name, f"version {version.number}{aliases}")


def _names(dvc_file: Path, md5: str) -> bool:
    try:
        return versioning.md5_of(dvc_file) == md5
    except CameraError:
        return False


def _same_lineage(version: registry.Version, lineage: dict[str, Any]) -> bool:
    try:
        return version.lineage is None or canonical_json(version.lineage) == canonical_json(lineage)
    except (ValueError, RecursionError):  # what is no JSON, or has no canonical text
        return False


def publication(folder: Path, lineage: dict[str, Any], store: Store, registered: Finding | None) -> Finding:
    """Whether anybody but the publication itself recorded it: this store, or MLflow's registry.

    What no artifact's digest holds (the model card, the recipe, the sections on machines) stands on this alone.

    Args:
        folder: where it lies.
        lineage: its lineage, with its own digest.
        store: the project's.
        registered: what is to be said of the registry, if it was asked.
    """
    name, digest = "publication", lineage["digest"]
    try:
        known = record_of(store, digest).digest == digest
    except CameraError as error:
        return wrong(name, str(error))
    places = published_places(store)
    here = [other for other, at in places if at == str(place(folder))]
    if digest in here or (not here and (known or any(digest == other for other, _ in places))):
        return verified(name, f"lineage digest {digest[:12]}, as this store recorded when it was made")
    known = registered is not None and (registered.name, registered.verdict) == (
        "MLflow registry",
        "verified",
    )
    # Where this store published another, the registry must know it of this place: a copy of another model is none.
    if known and (not here or any(at.folder == place(folder) for at in registry.versions_of(digest))):
        return verified(name, f"lineage digest {digest[:12]}, as MLflow's registry recorded")
    if here and registered is not None and registered.reason == "offline":
        return unverifiable(
            name, "this store did not record it, and MLflow's registry did not answer", "offline"
        )
    if here:
        return wrong(name, f"this store published {here[0][:12]} here, and not {digest[:12]}")
    return consistent(
        name, f"lineage digest {digest[:12]}, which neither this store nor MLflow's registry recorded"
    )


def recorded_md5(store: Store, folder: Path, digest: str) -> str | None:
    """DVC's hash of a publication in its place, as this store recorded it; None if it recorded none."""
    for made in store.all("publish"):
        with suppress(CameraError):  # as below
            record = read_record(made.path)
            if (record.lineage_digest, record.folder) == (digest, str(place(folder))) and record.dvc:
                return record.dvc.md5
    return None


def published_at(folder: Path, store: Store) -> bool:
    """Whether this project published something in a place: the store says so, or the registry as far as it answers."""
    at = place(folder)
    if any(where == str(at) for _, where in published_places(store)):
        return True
    with suppress(NetworkError):  # then what the registry knows of a signature is unverifiable, and says why
        return any(version.folder == at for version in registry.versions(at.name))
    return False


def link_instead(path: Path, store: Store) -> Path | None:
    """The place of a publication of this project, on the way to what a path leads to, where a link lies now."""
    for _ in range(40):  # as many as the system follows
        at = place(path)
        if kind(at) != "a link":
            return None
        if published_at(at, store):
            return at
        path = at.parent / os.readlink(at)
    return None


def published_places(store: Store) -> list[tuple[str, str]]:
    """What this store's runs published: lineage digest and folder."""
    found = [(record.digest, record.folder) for record in records(store)]
    for made in store.all("publish"):
        with suppress(CameraError):  # a record that cannot be read vouches for nothing
            record = read_record(made.path)
            if record.folder is not None and record.lineage_digest is not None:
                found.append((record.lineage_digest, record.folder))
    return found
