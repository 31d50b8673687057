"""The audit: follow a lineage back from what was published, and hash again all that is still there.

What each verdict stands on is in tasks/audit/finding.py.
"""

import os
from pathlib import Path

from camera.digests import digest_file
from camera.errors import CameraError
from camera.formats.gguf_parser import LINEAGE_KEY
from tasks import signing
from tasks.audit.ancestors import ancestors, folder_of_artifact
from tasks.audit.embedded import embedded
from tasks.audit.finding import Finding, heading, unverifiable, verified, wrong
from tasks.audit.hashing import Evidence, files_of_stages, reading_ahead
from tasks.audit.publication import publication
from tasks.audit.records import link_instead, published_at
from tasks.audit.sources import files_of_sources
from tasks.contents import followed, kind
from tasks.lease import lease
from tasks.lineage_form import NewerFormError, read_lineage
from tasks.registry import Version
from tasks.store import LINEAGE, Store

__all__ = ["Finding", "audit"]


def audit(
    path: Path,
    store: Store,
    *,
    from_remote: bool = False,
    signers: Path | None = None,
    require_signature: bool = False,
    copy_of: Version | None = None,
    everywhere: bool = False,
) -> Finding:
    """Verify a published folder, a GGUF file or an artifact folder back to its sources.

    Args:
        path: what to audit.
        store: the project's; where intermediate artifacts may still be.
        from_remote: read what DVC versions again from its remote, whatever is here.
        signers: ssh's list of allowed signers, for a signature of lineage.json.
        require_signature: whether what has no valid one is wrong.
        copy_of: for a copy of a published folder that DVC gave: the version it is of.
        everywhere: look at sources wherever the lineage says they are, also where this project never read them.

    Raises:
        CameraError: if there is no lineage to follow.
    """
    with lease(store) as in_use, reading_ahead() as hashes:  # nothing is evicted under our eyes
        evidence = Evidence(store, hashes, from_remote, everywhere)
        trust = (signers, require_signature)
        for at in (path, path.parent):
            if (link := link_instead(at, store)) is not None:
                detail = f"{link} is a link, and this project published a folder there"
                return heading(str(path), [wrong("published folder", detail)])
        if os.path.isdir(path):
            folder, only = followed(path), None
            if kind(path / LINEAGE) is None:
                raise CameraError(
                    f"{path} has no {LINEAGE}: it was not made by this pipeline, so nothing can be audited"
                )
        elif os.path.isfile(path):
            folder, only = path.parent, path.name
            if kind(folder / LINEAGE) is None:
                return heading(str(path), _gguf_alone(path, evidence, trust))
        else:
            raise CameraError(f"{path} does not exist: give a published folder, a GGUF file or an artifact")
        if only is not None and embedded(path) is None:
            raise CameraError(
                f"{path} holds no lineage ({LINEAGE_KEY}): it was not published by this pipeline"
            )
        try:
            before = digest_file(folder / LINEAGE) if kind(folder / LINEAGE) == "a file" else ""
            lineage = read_lineage(folder / LINEAGE)
        except NewerFormError:
            raise
        except (CameraError, OSError) as error:
            return heading(str(path), [wrong(LINEAGE, str(error))])
        for key in lineage["stages"]:
            in_use(key)
        if "files" in lineage:
            parts = publication(folder, lineage, evidence, only=only, copy_of=copy_of, trust=trust)
        else:
            hashes.begin([*files_of_stages(lineage, store), *files_of_sources(lineage, evidence)])
            parts = [folder_of_artifact(folder, lineage, evidence), *_no_publication(folder, evidence, trust)]
            parts += ancestors(lineage, evidence)
        if digest_file(folder / LINEAGE) != before:
            parts.append(wrong(LINEAGE, "changed while it was looked at: run the same command again"))
        return heading(str(path), parts)


def _gguf_alone(path: Path, evidence: Evidence, trust: tuple[Path | None, bool]) -> list[Finding]:
    lineage = embedded(path)
    if lineage is None:
        raise CameraError(f"{path} holds no lineage ({LINEAGE_KEY}): it was not published by this pipeline")
    evidence.hashes.begin(
        [path, *files_of_stages(lineage, evidence.store), *files_of_sources(lineage, evidence)]
    )
    parts = [*_no_publication(path.parent, evidence, trust), *ancestors(lineage, evidence)]
    return [_bytes_in_store(path, evidence), *parts]


def _bytes_in_store(path: Path, evidence: Evidence) -> Finding:
    store, name = evidence.store, f"bytes of {path.name}"
    digests, unread = evidence.hashes.read(path.parent, [path.name])
    if unread:
        return unverifiable(name, f"{path} cannot be read: {unread[path.name]}", "unreadable")
    evicted = [
        store.evicted("convert", at.name) for at in sorted((store.root / ".evicted" / "convert").glob("*"))
    ]
    for made in [*store.all("convert"), *evicted]:
        files = {} if made is None else made.manifest["files"]
        if any(entry["sha256"] == digests[path.name] for entry in files.values()):
            return verified(name, f"sha256 as this store recorded of convert {made.key[:12] if made else ''}")
    nothing = f"no {LINEAGE} beside it, and no artifact of this store has these bytes"
    return unverifiable(name, nothing, "absent")


def _no_publication(folder: Path, evidence: Evidence, trust: tuple[Path | None, bool]) -> list[Finding]:
    """What is to be said of something that is no publication: in the place of one, or where a signature is required."""
    if published_at(folder, evidence.store):
        detail = f"this project published a model in {folder}, and what lies there is no publication"
        return [wrong("published folder", detail)]
    signers, required = trust
    judged = signing.judge(folder, evidence.store, signers=signers, required=required)
    if judged is None:
        return []
    if judged.verdict in ("attested", "verified"):
        return [wrong("signature", "is of a published folder, and this is none")]
    return [Finding("signature", judged.verdict, judged.detail, reason=judged.reason)]
