"""The Prefect flow `audit`: every published model, walked back to its sources."""

import logging
from pathlib import Path

from prefect import flow
from prefect.artifacts import create_table_artifact

from camera.errors import CameraError
from flows.presence import present
from tasks.audit import audit as audit_one
from tasks.project import Project
from tasks.store import LINEAGE, Store

_log = logging.getLogger("camera.audit")


@flow(name="audit", persist_result=False)
def audit(published: str = "published") -> int:
    """Audit every published folder below a folder.

    Args:
        published: the folder that recipes publish to, relative to the folder the deployment was made in.

    Returns:
        How many models were audited.

    Raises:
        CameraError: naming each model with a part that does not match, and the part.
    """
    project = Project.here()
    project.configure()
    rows, wrong = [], []
    with present(project.home):
        for folder in published_folders(Path(published)):
            verdict, parts = _verdict(folder, Store(project.store))
            _log.info("%s: %s", folder, verdict)
            rows.append({"model": folder.name, "verdict": verdict, "parts": "; ".join(parts)})
            if verdict == "wrong":
                wrong.append(f"  {folder}: {'; '.join(parts)}")
        create_table_artifact(
            rows, key="audit", description="Every published model, and what is wrong with it"
        )
    if wrong:
        raise CameraError(f"{len(wrong)} of {len(rows)} published models do not match:\n" + "\n".join(wrong))
    return len(rows)


def published_folders(published: Path) -> list[Path]:
    """The published models below a folder; those being written have hidden names.

    Raises:
        CameraError: if there is no such folder.
    """
    if not published.is_dir():
        raise CameraError(f"{published} does not exist: give the folder that recipes publish to")
    return sorted(
        path.parent for path in published.glob(f"*/{LINEAGE}") if not path.parent.name.startswith(".")
    )


def _verdict(folder: Path, store: Store) -> tuple[str, list[str]]:
    try:
        found = audit_one(folder, store)
    except CameraError as error:
        return "wrong", [str(error)]
    wrong = [f"{finding.name}: {finding.detail}" for finding in found.all_of("wrong")]
    return ("wrong", wrong) if wrong else ("ok", [])
