"""What published files are: the files of three artifacts, `save`, `convert` and `report`, whose digests follow from them.

The model card alone is written when the model is published.
"""

from collections.abc import Iterator
from typing import Any

from camera.digests import digest_json
from tasks.audit.finding import STRENGTH, Finding, consistent, verified, wrong
from tasks.audit.hashing import Evidence

CARD = "README.md"
GGUFS = "GGUF files"
_PUBLISHED = {"save": "weights, config and tokenizer", "convert": GGUFS, "report": "report"}
_OF_REPORT = ("report.html", "results.json")


def made_of(lineage: dict[str, Any], evidence: Evidence, damaged: set[str]) -> list[Finding]:
    """Whether the published files give the digests of the artifacts that the lineage names, and all of them are of one.

    Args:
        lineage: of what was published.
        evidence: of the auditor's project.
        damaged: the names of the files that are not what the lineage says.
    """
    found: list[Finding] = []
    claimed: set[str] = {CARD}
    saved: set[str] = set()
    for stage in _PUBLISHED:
        tried = [_maker(entry, lineage, evidence) for entry in _candidates(stage, lineage)]
        if not tried:
            found.append(wrong(_PUBLISHED[stage], f"no stage `{stage}` of the lineage made them"))
            continue
        # Of two ancestries with the same bytes, either will do.
        finding, names, digest = min(tried, key=lambda each: STRENGTH[each[0].verdict])
        if stage == "save":
            saved.add(digest)
        elif finding.verdict != "wrong" and not any(
            _descends(lineage, entry, saved)
            for entry in _candidates(stage, lineage)
            if entry["digest"] == digest
        ):
            finding = wrong(finding.name, "was not made of the published weights")
        if finding.verdict != "wrong" and (bad := sorted(names & damaged)):
            finding = wrong(finding.name, f"{bad[0]} is not the one that it made")
        found.append(finding)
        claimed |= names
    for name in sorted(lineage["files"].keys() - claimed):
        found.append(wrong(name, "no stage of the lineage made it"))
    return found


def _candidates(stage: str, lineage: dict[str, Any]) -> list[dict[str, Any]]:
    copied = lineage.get("made_of")
    return [
        entry
        for key, entry in lineage["stages"].items()
        if entry["stage"] == stage and (entry["step"] == stage if copied is None else key in copied)
    ]


def _maker(
    entry: dict[str, Any], lineage: dict[str, Any], evidence: Evidence
) -> tuple[Finding, set[str], str]:
    """What is to be said of the files that a stage made; their names; and its digest."""
    stage, digest, published = entry["stage"], entry["digest"], lineage["files"]
    name = f"{_PUBLISHED[stage]} of {entry['step']} {entry['key'][:12]}"
    known = evidence.known(entry)
    files = (lineage.get("made_of") or {}).get(entry["key"])
    if files is None and known is not None:
        files = {file: about["sha256"] for file, about in known.manifest["files"].items()}
    if files is None and stage == "convert":
        files = {file: sha256 for file, sha256 in published.items() if file.endswith(".gguf")}
    if files is None:
        return (
            consistent(name, "which files they are is said by nothing here"),
            set(_of(stage, published)),
            digest,
        )
    names = {file for file in files if file != CARD and (stage != "report" or file in _OF_REPORT)}
    if digest_json(files) != digest:
        return wrong(name, f"are not what it made: they do not give its digest {digest[:12]}"), names, digest
    for file in sorted(names):
        if published.get(file) != files[file]:
            return wrong(name, f"{file} is not the one that it made"), names, digest
    if known is None:
        return (
            consistent(name, f"give its digest {digest[:12]}, which nothing here vouches for"),
            names,
            digest,
        )
    return verified(name, f"give its digest {digest[:12]}, which this store knows"), names, digest


def _of(stage: str, published: dict[str, str]) -> Iterator[str]:
    """The names that a stage's files would have."""
    for file in published:
        of = "convert" if file.endswith(".gguf") else "report" if file in _OF_REPORT else "save"
        if of == stage:
            yield file


def _descends(lineage: dict[str, Any], entry: dict[str, Any], digests: set[str]) -> bool:
    """Whether any stage that an entry descends from has one of these digests."""
    waiting, seen = [entry], set[str]()
    while waiting:
        for given in waiting.pop()["inputs"].values():
            if given["digest"] in digests and given["key"] is not None:
                return True
            parent = lineage["stages"].get(given["key"])
            if parent is not None and given["key"] not in seen:
                seen.add(given["key"])
                waiting.append(parent)
    return False
