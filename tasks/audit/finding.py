"""What an audit finds: a tree of parts, each with one of five verdicts, and what the whole stands on."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, get_args

Verdict = Literal["verified", "attested", "consistent", "unverifiable", "wrong"]
"""From the strongest to the weakest: recomputed from bytes that are themselves verified; signed by a key the auditor trusts;
only self-declared; not to be verified here (why); not what the lineage says (what)."""
Reason = Literal[
    "",
    "evicted",
    "absent",
    "unreadable",
    "not looked at",
    "offline",
    "untracked",
    "superseded",
    "unjudged",
    "other versions",
]
"""Why a part could not be verified: its bytes were evicted by `camera gc`; they are not on this machine; they cannot be read; the lineage names a
place that this project never read, as far as its store knows; a server or remote did not answer; it was never recorded there; a later
publication took its place; nobody said whose signature is believed; it was made with others."""
STRENGTH: dict[Verdict, int] = {verdict: number for number, verdict in enumerate(get_args(Verdict))}
"""0 is the strongest."""
NAMED = 3
"""So many parts a first line names."""


def weakest(verdicts: Iterable[Verdict]) -> Verdict:
    """The weakest of some verdicts; `verified` of none."""
    return max(verdicts, key=STRENGTH.__getitem__, default="verified")


@dataclass
class Finding:
    """One part of a lineage, what was found of it, and its parts."""

    name: str
    verdict: Verdict
    """Its own; of a heading the weakest below it."""
    detail: str = ""
    parts: list["Finding"] = field(default_factory=list)
    reason: Reason = ""
    """For what could not be verified."""

    @property
    def heading(self) -> bool:
        """Whether it only holds parts together."""
        return bool(self.parts) and not self.detail

    @property
    def overall(self) -> Verdict:
        """The weakest verdict of it and all below."""
        return weakest(part.verdict for part in self.every())

    def add(self, *parts: "Finding") -> None:
        """Put parts below it; a heading is as weak as they are."""
        self.parts += parts
        if self.heading:
            self.verdict = weakest([self.verdict, *(part.overall for part in parts)])

    def every(self) -> Iterator["Finding"]:
        """This and all below it."""
        yield self
        for part in self.parts:
            yield from part.every()

    def all_of(self, verdict: Verdict) -> list["Finding"]:
        """What below has this verdict, headings left out."""
        return [part for part in self.every() if part.verdict == verdict and not part.heading]


def heading(name: str, parts: Iterable[Finding]) -> Finding:
    """Parts under one name."""
    found = Finding(name, "verified")
    found.add(*parts)
    return found


def verified(name: str, detail: str = "") -> Finding:
    """A part that was recomputed from bytes that are themselves verified."""
    return Finding(name, "verified", detail)


def attested(name: str, detail: str) -> Finding:
    """A part that a trusted key vouches for."""
    return Finding(name, "attested", detail)


def consistent(name: str, detail: str) -> Finding:
    """A part that contradicts nothing, and that nobody but itself vouches for."""
    return Finding(name, "consistent", detail)


def unverifiable(name: str, detail: str, reason: Reason) -> Finding:
    """A part that nothing is known of here."""
    return Finding(name, "unverifiable", detail, reason=reason)


def wrong(name: str, detail: str) -> Finding:
    """A part that is not what the lineage says."""
    return Finding(name, "wrong", detail)


def stands_on(finding: Finding) -> str:
    """In a few words, what a finding's overall verdict stands on."""
    overall = finding.overall
    parts = finding.all_of(overall)
    number = f"{len(parts)} part{'' if len(parts) == 1 else 's'}"
    if overall == "verified":
        return f"{number} recomputed from their bytes"
    if overall == "attested":
        signed = [part.detail for part in parts if part.name == "signature"]
        return (
            f"signed {', '.join(signed)}; {len(finding.all_of('verified'))} parts recomputed from their bytes"
        )
    names = ", ".join(part.name for part in parts[:NAMED]) + (" …" if len(parts) > NAMED else "")
    if overall == "consistent":
        return f"{number} only the publication itself vouches for: {names}"
    if overall == "unverifiable":
        reasons = Counter(part.reason for part in parts)
        why = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        return f"{number} cannot be verified here ({why}): {names}"
    return f"{number} not what the lineage says: {names}"
