"""What an audit finds: a tree of parts, each right, wrong, or not to be verified here."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

Verdict = Literal["ok", "wrong", "unverified"]
Reason = Literal["", "evicted", "absent", "offline", "untracked", "superseded", "other versions"]
"""Why a part could not be verified: its bytes were evicted by `camera gc`; they are not on this machine; a server or
remote did not answer; it was never recorded there; a later publication took its place; it was made with others."""


@dataclass
class Finding:
    """One part of a lineage, what was found of it, and its parts."""

    name: str
    verdict: Verdict
    detail: str = ""
    parts: list["Finding"] = field(default_factory=list)
    reason: Reason = ""
    """For what could not be verified."""

    def every(self) -> Iterator["Finding"]:
        """This and all below it."""
        yield self
        for part in self.parts:
            yield from part.every()

    def all_of(self, verdict: Verdict) -> list["Finding"]:
        """What below has this verdict."""
        return [finding for finding in self.every() if finding.verdict == verdict]


def ok(name: str, detail: str = "") -> Finding:
    """A part that is right."""
    return Finding(name, "ok", detail)


def wrong(name: str, detail: str) -> Finding:
    """A part that is not what the lineage says."""
    return Finding(name, "wrong", detail)


def unverified(name: str, detail: str, reason: Reason) -> Finding:
    """A part that nothing is known of here."""
    return Finding(name, "unverified", detail, reason=reason)
