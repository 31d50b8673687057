"""The Prefect flow `audit`: every published model, walked back to its sources."""

import logging
from pathlib import Path

from prefect import flow
from prefect.artifacts import create_table_artifact

from camera.errors import CameraError
from camera.escape import one_line
from flows.recovery import running_flow
from tasks.audit.finding import Finding, Verdict
from tasks.published import Found, audit_all, audit_found
from tasks.store import Store

_log = logging.getLogger("camera.audit")


@flow(name="audit", persist_result=False)
def audit(published: str = "published") -> int:
    """Audit what `camera audit --all` audits: every published folder, and every version in the registry.

    Args:
        published: the folder that recipes publish to, relative to the folder the deployment was made in.

    Returns:
        How many models were audited.

    Raises:
        CameraError: naming each model with a part that does not match, and the part.
    """
    if not Path(published).is_dir():
        raise CameraError(f"{published} does not exist: give the folder that recipes publish to")
    rows, wrong = [], []
    with running_flow() as project:
        store = Store(project.store)
        for found in audit_all(Path(published), store, lambda model: _audited(model, store)):
            bad = _named(found, "wrong")
            weak = [*_named(found, "unverifiable"), *_named(found, "consistent")]
            verdict = found.overall
            _log.info("%s: %s", found.name, verdict)
            columns = {"wrong": "; ".join(bad), "could not verify": "; ".join(weak)}
            rows.append({"model": one_line(found.name), "verdict": verdict, **columns})
            if bad:
                wrong.append(f"  {one_line(found.name)}: {'; '.join(bad)}")
        create_table_artifact(
            rows, key="audit", description="Every published model, what is wrong, and what is not known"
        )
    if wrong:
        raise CameraError(f"{len(wrong)} of {len(rows)} published models do not match:\n" + "\n".join(wrong))
    return len(rows)


def _named(found: Finding, verdict: Verdict) -> list[str]:
    return [one_line(f"{part.name}: {part.detail}") for part in found.all_of(verdict)]


def _audited(model: Found, store: Store) -> Finding:
    return audit_found(model, store, from_remote=False, signers=None, signed=False)
