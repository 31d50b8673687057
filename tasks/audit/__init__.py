"""The audit: follow a lineage back from what was published, and hash again all that is still there.

What each verdict stands on is in tasks/audit/finding.py.
"""

import json
from pathlib import Path
from typing import Any

from camera.digests import files_below
from camera.errors import CameraError
from camera.files import read_json
from camera.formats.gguf_parser import LINEAGE_KEY, read_metadata
from tasks.audit import records
from tasks.audit.ancestors import ancestors, artifact
from tasks.audit.finding import Finding, heading, unverifiable, verified, wrong
from tasks.audit.hashing import Evidence, files_of, reading_ahead
from tasks.lease import lease
from tasks.lineage import portable
from tasks.lineage_form import check_lineage, damages
from tasks.store import LINEAGE, MANIFEST, Store

__all__ = ["Finding", "audit"]


def audit(
    path: Path,
    store: Store,
    *,
    from_remote: bool = False,
    signers: Path | None = None,
    require_signature: bool = False,
    restored: str | None = None,
) -> Finding:
    """Verify a published folder, a GGUF file or an artifact folder back to its sources.

    Args:
        path: what to audit.
        store: where intermediate artifacts may still be.
        from_remote: read what DVC versions again from its remote, whatever is here.
        signers: ssh's list of allowed signers, for a signature of a published folder's lineage.json.
        require_signature: whether a published folder without one is wrong.
        restored: for a copy of a published folder that DVC gave: the version it is of.

    Raises:
        CameraError: if there is no lineage to follow.
    """
    with lease(store) as in_use, reading_ahead() as hashes:  # nothing is evicted under our eyes
        evidence = Evidence(store, hashes, from_remote)
        if path.is_file():
            return _gguf(path, evidence)
        if not path.is_dir():
            raise CameraError(f"{path} does not exist: give a published folder, a GGUF file or an artifact")
        if not (path / LINEAGE).is_file():
            raise CameraError(
                f"{path} has no {LINEAGE}: it was not made by this pipeline, so nothing can be audited"
            )
        lineage = check_lineage(read_json(path / LINEAGE), str(path / LINEAGE))
        for key in lineage["stages"]:
            in_use(key)
        root = heading(str(path), [])
        if "files" in lineage:
            present = [path / name for name in files_below(path) if name != LINEAGE]
            hashes.begin([*present, *files_of(lineage, store)])
            root.add(*_published(path, lineage, evidence, restored))
            if (signed := records.signature(path, signers, require_signature)) is not None:
                root.add(signed)
        elif (path / MANIFEST).is_file():
            manifest, its_store = read_json(path / MANIFEST), Store(path.parent.parent)
            name = f"{manifest['stage']} {manifest['key'][:12]}"
            root.add(artifact(name, manifest, Evidence(its_store, hashes)))
        root.add(*ancestors(lineage, evidence))
        return root


def _gguf(path: Path, evidence: Evidence) -> Finding:
    embedded = _embedded(path)
    if embedded is None:
        raise CameraError(f"{path} holds no lineage ({LINEAGE_KEY}): it was not published by this pipeline")
    evidence.hashes.begin([path, *files_of(embedded, evidence.store)])
    beside = path.parent / LINEAGE
    published = check_lineage(read_json(beside), str(beside)) if beside.is_file() else {}
    name = "bytes of the file"
    digest = evidence.hashes.digests(path.parent, [path.name])[path.name]
    if "files" not in published:
        found = _bytes_in_store(name, digest, evidence.store)
    elif published["files"].get(path.name) == digest:
        found = verified(name, f"sha256 is as in {beside}")
    else:
        found = wrong(name, f"sha256 is not the one in {beside}")
    return heading(str(path), [found, *ancestors(embedded, evidence)])


def _bytes_in_store(name: str, found: str, store: Store) -> Finding:
    for pattern in (f"convert/*/{MANIFEST}", f".evicted/convert/*/{MANIFEST}"):
        for manifest_path in sorted(store.root.glob(pattern)):
            if any(entry["sha256"] == found for entry in read_json(manifest_path)["files"].values()):
                return verified(name, f"sha256 as in {manifest_path}")
    return unverifiable(
        name, "no lineage.json beside it, and no artifact of this store has these bytes", "absent"
    )


def _published(
    path: Path, lineage: dict[str, Any], evidence: Evidence, restored: str | None
) -> list[Finding]:
    recorded = _recorded(path, lineage, evidence, restored)  # first: the files are being hashed meanwhile
    name = f"{len(lineage['files'])} published files"
    wrongs = [wrong(name, damage) for damage in damages(path, lineage, evidence.hashes.digests)]
    ggufs = [path / file for file in lineage["files"] if file.endswith(".gguf")]
    inside = [_lineage_inside(file, lineage) for file in ggufs if file.is_file()]
    return [*(wrongs or [verified(name)]), *inside, *recorded]


def _recorded(path: Path, lineage: dict[str, Any], evidence: Evidence, restored: str | None) -> list[Finding]:
    if restored is None:
        version = records.dvc(path, evidence.from_remote)
    else:
        version = verified(
            "DVC version", f"{restored}; these are its files: a later version lies in the folder"
        )
    found = [] if version is None else [version]
    run = records.mlflow_run(lineage)
    if run is None or run.reason in ("offline", "absent"):
        return found if run is None else [*found, run]
    return [*found, run, records.mlflow_registry(lineage, path.with_name(path.name + ".dvc"))]


def _lineage_inside(path: Path, lineage: dict[str, Any]) -> Finding:
    name = f"lineage inside {path.name}"
    try:
        embedded = _embedded(path)
    except CameraError as error:
        return wrong(name, str(error))
    known = portable(lineage)["stages"]
    agrees = embedded is not None and all(
        known.get(key) == entry for key, entry in embedded["stages"].items()
    )
    return verified(name) if agrees else wrong(name, "does not agree with lineage.json")


def _embedded(path: Path) -> dict[str, Any] | None:
    text = read_metadata(path).get(LINEAGE_KEY)
    if text is None:
        return None
    try:
        return check_lineage(json.loads(text), f"{LINEAGE_KEY} in {path}")
    except (json.JSONDecodeError, RecursionError):
        raise CameraError(f"{path}: {LINEAGE_KEY} is not JSON") from None
