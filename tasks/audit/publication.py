"""A published folder, or one GGUF file of it: its bytes, what they are, who recorded and who signed them."""

from pathlib import Path
from typing import Any

from tasks import signing
from tasks.audit import records
from tasks.audit.ancestors import ancestors
from tasks.audit.embedded import lineage_inside
from tasks.audit.finding import Finding, attested, consistent, heading, unverifiable, verified, wrong
from tasks.audit.hashing import Evidence, files_of_stages
from tasks.audit.made_of import GGUFS, made_of
from tasks.audit.sources import files_of_sources
from tasks.contents import contents
from tasks.lineage_form import own_digest_holds
from tasks.registry import Version
from tasks.store import LINEAGE

_VOUCHED = ("absent", "evicted", "not looked at", "offline", "untracked")
"""Reasons for which a part cannot be verified here, and for which it need not be where a trusted key signed the lineage."""


def publication(
    folder: Path,
    lineage: dict[str, Any],
    evidence: Evidence,
    *,
    only: str | None = None,
    copy_of: Version | None = None,
    trust: tuple[Path | None, bool] = (None, False),
) -> list[Finding]:
    """What is to be said of a published folder. What it says of itself is verified where others recorded that it says so.

    Args:
        folder: where lineage.json lies.
        lineage: what it says.
        evidence: of the auditor's project.
        only: one GGUF file, if the others are not asked for.
        copy_of: for a copy that DVC gave: the version it is of.
        trust: whose signatures count, and whether there must be one.
    """
    files, beyond = contents(folder)
    if only is not None:
        beyond = {only: beyond[only]} if only in beyond else {}
    names = [only] if only is not None else [name for name in files if name != LINEAGE]
    evidence.hashes.begin(
        [
            *(folder / name for name in names),
            *files_of_stages(lineage, evidence.store),
            *files_of_sources(lineage, evidence),
        ]
    )
    signers, required = trust
    judged = signing.judge(folder, evidence.store, signers=signers, required=required, version=copy_of)
    recorded = _recorded(folder, lineage, evidence, copy_of)  # while the files are being hashed
    bytes_found, damaged = _files(folder, lineage, evidence, only, names, beyond)
    own = [
        _own_digest(folder, lineage),
        *bytes_found,
        *(
            lineage_inside(folder / name, lineage)
            for name in names
            if name in lineage["files"] and name.endswith(".gguf") and name in files
        ),
    ]
    known = recorded[0].verdict == "verified" and own[0].verdict == "verified"
    made = made_of(lineage, evidence, damaged)
    parts = [
        *(
            part if known or part.verdict != "verified" else consistent(part.name, part.detail)
            for part in own
        ),
        *(part for part in made if only is None or part.verdict == "wrong" or part.name.startswith(GGUFS)),
        *recorded,
    ]
    if judged is not None:
        parts.append(Finding("signature", judged.verdict, judged.detail, reason=judged.reason))
    parts += ancestors(lineage, evidence)
    if judged is not None and judged.verdict == "attested":
        parts = [_vouched(part) for part in parts]
    return parts


def _own_digest(folder: Path, lineage: dict[str, Any]) -> Finding:
    if own_digest_holds(lineage):
        return verified(LINEAGE, f"digest {lineage['digest'][:12]}")
    return wrong(LINEAGE, f"{folder / LINEAGE} does not have its own digest: it was changed after publishing")


def _files(
    folder: Path,
    lineage: dict[str, Any],
    evidence: Evidence,
    only: str | None,
    names: list[str],
    beyond: dict[str, str],
) -> tuple[list[Finding], set[str]]:
    """What is to be said of the bytes, and the names of those that are not as the lineage says."""
    expected = lineage["files"]
    title = f"{len(expected)} published files" if only is None else f"bytes of {only}"
    found = {
        name: wrong(title, f"{folder / name} is {what}, and not part of the publication")
        for name, what in beyond.items()
    }
    digests, unread = evidence.hashes.read(folder, names)
    for name in sorted({*names, *(expected if only is None else ())} - beyond.keys()):
        if name in unread:
            found[name] = unverifiable(title, f"{folder / name} cannot be read: {unread[name]}", "unreadable")
        elif name not in digests:
            found[name] = wrong(title, f"{folder / name} is missing")
        elif name not in expected:
            found[name] = wrong(title, f"{folder / name} is not part of the publication")
        elif digests[name] != expected[name]:
            found[name] = wrong(title, f"{folder / name} does not have the sha256 in {LINEAGE}")
    damaged = {name for name, part in found.items() if part.verdict == "wrong"}
    return [*found.values()] or [verified(title, f"have the sha256 in {LINEAGE}")], damaged


def _recorded(
    folder: Path, lineage: dict[str, Any], evidence: Evidence, copy_of: Version | None
) -> list[Finding]:
    place = folder
    if copy_of is None:
        md5 = records.recorded_md5(evidence.store, folder, lineage["digest"])
        version = records.dvc(folder, evidence.hashes, evidence.from_remote, md5)
    else:
        place = copy_of.folder
        version = verified(
            "DVC version", f"{copy_of.dvc_md5}; these are its files, not those in {copy_of.folder}"
        )
    run = records.mlflow_run(lineage)
    registered = None
    if run is not None and run.reason not in ("offline", "absent"):
        registered = records.mlflow_registry(lineage, place, folder.with_name(folder.name + ".dvc"))
    if own_digest_holds(lineage):
        known = records.publication(place, lineage, evidence.store, registered or run)
    else:
        known = consistent("publication", f"calls itself {lineage['digest'][:12]}, and is not")
    return [part for part in (known, version, run, registered) if part is not None]


def _vouched(part: Finding) -> Finding:
    """A part as it stands where a trusted key signed the lineage that it is of."""
    below = [_vouched(each) for each in part.parts]
    if part.heading:
        return heading(part.name, below)
    weak = part.verdict == "consistent" or (part.verdict == "unverifiable" and part.reason in _VOUCHED)
    found = attested(part.name, f"as signed; {part.detail}") if weak else part
    found.parts = below
    return found
