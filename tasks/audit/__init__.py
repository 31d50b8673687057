"""The audit: walk a lineage back from what was published, and hash again all that is still there.

Three answers, kept apart: a part is right, it is wrong, or it could not be verified here (and why).
"""

import json
from pathlib import Path
from typing import Any

from camera.digests import digest_json, files_below
from camera.errors import CameraError
from camera.files import read_json
from camera.formats.gguf_parser import read_metadata
from camera.formats.layout import LINEAGE_KEY
from tasks.audit import records
from tasks.audit.ancestors import ancestors, artifact
from tasks.audit.finding import Finding, ok, unverified, wrong
from tasks.audit.hashing import Hashing, files_of, reading_ahead
from tasks.lease import lease
from tasks.lineage import portable
from tasks.lineage_form import check_lineage
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
        CameraError: if there is no lineage to walk.
    """
    with lease(store) as in_use, reading_ahead() as hashes:  # nothing is evicted under our eyes
        if path.is_file():
            return _gguf(path, store, hashes, from_remote)
        if not path.is_dir():
            raise CameraError(f"{path} does not exist: give a published folder, a GGUF file or an artifact")
        if not (path / LINEAGE).is_file():
            raise CameraError(
                f"{path} has no {LINEAGE}: it was not made by this pipeline, so nothing can be audited"
            )
        lineage = check_lineage(read_json(path / LINEAGE), str(path / LINEAGE))
        for key in lineage["stages"]:
            in_use(key)
        root = Finding(str(path), "ok")
        if "files" in lineage:
            hashes.begin([*_present(path), *files_of(lineage, store)])
            root.parts += _published(path, lineage, hashes, from_remote, restored)
            if (signed := records.signature(path, signers, require_signature)) is not None:
                root.parts.append(signed)
        elif (path / MANIFEST).is_file():
            manifest = read_json(path / MANIFEST)
            root.parts.append(
                artifact(
                    Store(path.parent.parent), hashes, manifest["stage"], manifest["key"], manifest["digest"]
                )
            )
        root.parts += ancestors(lineage, store, hashes, from_remote)
        return root


def _gguf(path: Path, store: Store, hashes: Hashing, from_remote: bool) -> Finding:
    embedded = _embedded(path)
    if embedded is None:
        raise CameraError(f"{path} holds no lineage ({LINEAGE_KEY}): it was not published by this pipeline")
    hashes.begin([path, *files_of(embedded, store)])
    root = Finding(str(path), "ok")
    beside = path.parent / LINEAGE
    published = check_lineage(read_json(beside), str(beside)) if beside.is_file() else {}
    name = "bytes of the file"
    digest = hashes.digests(path.parent, [path.name])[path.name]
    if "files" in published:
        right = published["files"].get(path.name) == digest
        detail = f"sha256 is {'as' if right else 'not the one'} in {beside}"
        root.parts.append(ok(name, detail) if right else wrong(name, detail))
    else:
        root.parts.append(_bytes_in_store(name, digest, store))
    root.parts += ancestors(embedded, store, hashes, from_remote)
    return root


def _bytes_in_store(name: str, found: str, store: Store) -> Finding:
    for pattern in (f"convert/*/{MANIFEST}", f".evicted/convert/*/{MANIFEST}"):
        for manifest_path in sorted(store.root.glob(pattern)):
            manifest = read_json(manifest_path)
            if any(entry["sha256"] == found for entry in manifest["files"].values()):
                return ok(name, f"sha256 as in {manifest_path}")
    return unverified(
        name, "no lineage.json beside it, and no artifact of this store has these bytes", "absent"
    )


def _published(
    path: Path, lineage: dict[str, Any], hashes: Hashing, from_remote: bool, restored: str | None
) -> list[Finding]:
    recorded = _recorded(path, lineage, from_remote, restored)  # first: the files are being hashed meanwhile
    name = f"{len(lineage['files'])} published files"
    damages = _damages(path, lineage, hashes)
    findings = [Finding(name, "ok")] if not damages else [wrong(name, damage) for damage in damages]
    for file in lineage["files"]:
        if file.endswith(".gguf") and (path / file).is_file():
            findings.append(_lineage_inside(path / file, lineage))
    return findings + recorded


def _recorded(path: Path, lineage: dict[str, Any], from_remote: bool, restored: str | None) -> list[Finding]:
    findings = []
    if restored is None:
        findings.append(records.dvc(path, from_remote))
    else:
        findings.append(
            ok("DVC version", f"{restored}; these are its files: a later version lies in the folder")
        )
    findings.append(run := records.mlflow_run(lineage))
    if run.reason not in ("offline", "untracked", "absent"):
        findings.append(records.mlflow_registry(lineage, path.with_name(path.name + ".dvc")))
    return findings


def _present(path: Path) -> list[Path]:
    return [path / name for name in files_below(path) if name != LINEAGE]


def _damages(path: Path, lineage: dict[str, Any], hashes: Hashing) -> list[str]:
    """Everything that is wrong with a published folder: its lineage's own digest, and each file by name."""
    found = []
    body = {field: value for field, value in lineage.items() if field != "digest"}
    if digest_json(body) != lineage["digest"]:
        found.append(f"{path / LINEAGE} does not have its own digest: it was changed after publishing")
    present = hashes.digests(path, (name for name in files_below(path) if name != LINEAGE))
    for name in sorted(lineage["files"].keys() | present.keys()):
        if name not in present:
            found.append(f"{path / name} is missing")
        elif name not in lineage["files"]:
            found.append(f"{path / name} is not part of the publication")
        elif present[name] != lineage["files"][name]:
            found.append(f"{path / name} does not have the sha256 in {LINEAGE}")
    return found


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
    return ok(name) if agrees else wrong(name, "does not agree with lineage.json")


def _embedded(path: Path) -> dict[str, Any] | None:
    text = read_metadata(path).get(LINEAGE_KEY)
    if text is None:
        return None
    try:
        return check_lineage(json.loads(text), f"{LINEAGE_KEY} in {path}")
    except (json.JSONDecodeError, RecursionError):
        raise CameraError(f"{path}: {LINEAGE_KEY} is not JSON") from None
