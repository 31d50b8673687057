"""Who else recorded a publication: MLflow's run, its registry, DVC; and who signed it."""

from pathlib import Path, PurePosixPath
from typing import Any

from camera.digests import canonical_json, digest_files, files_below
from camera.errors import CameraError, NetworkError
from tasks import registry, runs, signing, versioning
from tasks.audit.finding import Finding, unverifiable, verified, wrong
from tasks.runs import flatten, mlflow_name, parameter
from tasks.store import LINEAGE


def dvc(folder: Path, from_remote: bool) -> Finding | None:
    """The .dvc file beside a published folder, compared with the folder, and if asked with the remote; None without one."""
    file = folder.with_name(folder.name + ".dvc")
    if not file.is_file():
        return None
    try:
        difference = versioning.verify(file)
    except CameraError as error:
        return unverifiable("DVC version", str(error), "absent")
    if difference is not None:
        return wrong("DVC version", difference)
    finding = verified("DVC version", f"{file.name} {versioning.md5_of(file)}")
    if from_remote:
        finding.parts.append(_remote(folder, file))
    return finding


def _remote(folder: Path, file: Path) -> Finding:
    root = versioning.repository_root(folder)
    assert root is not None  # `verify` went through
    try:
        found, where = versioning.stored_digests(root, versioning.md5_of(file), PurePosixPath(), True)
    except NetworkError as error:
        return unverifiable("DVC remote", str(error), "offline")
    except CameraError as error:
        return unverifiable("DVC remote", str(error), "absent")
    expected = digest_files(folder, files_below(folder))
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


def mlflow_registry(lineage: dict[str, Any], dvc_file: Path) -> Finding:
    """The registry's version of this lineage: its tags."""
    name = "MLflow registry"
    try:
        known = registry.versions(lineage["name"])
    except NetworkError as error:
        return unverifiable(name, str(error), "offline")
    version = next((entry for entry in known if entry.lineage_digest == lineage["digest"]), None)
    if version is None:
        return unverifiable(name, "no version has this lineage digest", "untracked")
    aliases = f" ({', '.join(version.aliases)})" if version.aliases else ""
    ggufs = {file: digest for file, digest in lineage["files"].items() if file.endswith(".gguf")}
    if version.gguf_digests != ggufs:
        return wrong(name, f"version {version.number}{aliases} names other GGUF digests")
    if version.lineage is not None and canonical_json(version.lineage) != canonical_json(lineage):
        return wrong(name, f"version {version.number}{aliases} holds another lineage")
    if version.dvc_md5 and dvc_file.is_file() and versioning.md5_of(dvc_file) != version.dvc_md5:
        return wrong(
            name, f"version {version.number}{aliases} names another DVC version than {dvc_file.name}"
        )
    return verified(name, f"version {version.number}{aliases}")


def signature(folder: Path, signers: Path | None, required: bool) -> Finding | None:
    """Who signed lineage.json; None where there is no signature and none is required."""
    file = signing.signature_of(folder)
    if not file.is_file():
        return wrong("signature", f"required, and there is no {file.name}") if required else None
    if signers is None:
        return unverifiable("signature", f"{file.name}: give --signers to say whose is believed", "absent")
    try:
        return verified("signature", f"by {signing.verify(folder / LINEAGE, file, signers)}")
    except signing.NoToolError as error:
        return unverifiable("signature", str(error), "absent")
    except CameraError as error:
        return wrong("signature", str(error))
