"""What `camera audit` does with each published model. Imports torch, mlflow and dvc only where they are needed."""

from collections import Counter
from pathlib import Path
from typing import Any

from camera.cli.output import note
from camera.errors import CameraError
from tasks.audit.finding import NAMED, Finding, Verdict, stands_on, unverifiable, weakest, wrong
from tasks.lineage_form import own_digest_holds, read_publication
from tasks.published import Found, audit_all, audit_found, audit_named
from tasks.store import LINEAGE, Store


def audited(
    model: str | None, published: Path, home: Path, store: Store, *, rebuild: bool, **how: Any
) -> list[Finding]:
    """Audit one model by its path or name, or all.

    Args:
        model: None for every published model.
        published: where models are published.
        home: the project's, in which a recipe is run again.
        store: its artifacts.
        rebuild: whether to run the recipe again.
        how: as for `tasks.published.audit_found`.
    """

    def audit(found: Found) -> Finding:
        finding = audit_found(found, store, **how)
        if rebuild and finding.overall != "wrong":  # of what was changed, the recipe may be another's
            finding.add(_rebuilt(found, home))
        return finding

    if model is None:
        if found := list(audit_all(published, store, audit)):
            return found
        raise CameraError(f"nothing is published below {published}, and the registry has no version")
    return [audit_named(model, store, audit)]


def as_document(findings: list[Finding]) -> dict[str, Any]:
    """The answer for scripts."""
    reasons = Counter(part.reason for part in parts(findings, "unverifiable"))
    common = {"verdict": overall(findings), "stands_on": summary(findings), "unverifiable": reasons}
    return {**common, "tree": findings[0]} if len(findings) == 1 else {**common, "models": findings}


def overall(findings: list[Finding]) -> Verdict:
    """The verdict of the weakest part of all."""
    return weakest(finding.overall for finding in findings)


def exit_code(findings: list[Finding]) -> int:
    """0: all is verified or attested; 1: something is wrong; 3: nothing is wrong, and something is no more than consistent."""
    return {"verified": 0, "attested": 0, "wrong": 1}.get(overall(findings), 3)


def summary(findings: list[Finding]) -> str:
    """What the weakest verdict is of, and what it stands on, in a few words."""
    if len(findings) == 1:
        return f"{findings[0].name}: {stands_on(findings[0])}"
    verdict = overall(findings)
    weak = [finding.name for finding in findings if finding.overall == verdict]
    return f"{len(weak)} of {len(findings)} published models: {', '.join(weak[:NAMED])}" + (
        " …" if len(weak) > NAMED else ""
    )


def parts(findings: list[Finding], verdict: Verdict) -> list[Finding]:
    """All parts that have a verdict."""
    return [part for finding in findings for part in finding.all_of(verdict)]


def _rebuilt(found: Found, home: Path) -> Finding:
    from tasks.audit.rebuild import NAME, rebuild  # brings torch, which a plain audit does not need

    try:
        lineage = read_publication(found.path)
    except CameraError:
        needs = f"--rebuild needs a published folder, whose {LINEAGE} holds the recipe"
        return unverifiable(NAME, needs, "absent")
    if not own_digest_holds(lineage):
        return wrong(NAME, f"{found.path / LINEAGE} changed since it was audited")
    return rebuild(lineage, home, lambda step: note(f"rebuilding {step}"))
