"""Auditing from the command line: one published model or all, and what changed between two."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from camera.cli.output import note
from camera.digests import digest_json
from camera.errors import CameraError
from camera.files import read_json
from camera.units import bytes_text
from tasks.audit import Finding
from tasks.lineage_form import check_lineage
from tasks.project import Project
from tasks.published import Found, audit_all, audit_found, located
from tasks.store import LINEAGE, Store

if TYPE_CHECKING:
    from tasks.diff import Change, Comparison


@dataclass(frozen=True)
class Audit:
    """How to audit."""

    project: Project
    remote: bool
    signers: Path | None
    signed: bool
    again: bool
    """Whether to run the recipe again."""

    def one(self, reference: str) -> Finding:
        """Audit a path or a name."""
        with located(reference) as found:
            return self._audited(found)

    def everything(self, published: Path) -> list[Finding]:
        """Audit every published model."""
        return list(audit_all(published, Store(self.project.store), self._audited))

    def document(self, found: list[Finding]) -> dict[str, Any]:
        """The answer for scripts."""
        verdict = "wrong" if any(finding.all_of("wrong") for finding in found) else "ok"
        trees = [asdict(finding) for finding in found]
        unverified = [part for finding in found for part in finding.all_of("unverified")]
        reasons: dict[str, int] = {}
        for part in unverified:
            reasons[part.reason] = reasons.get(part.reason, 0) + 1
        common = {"verdict": verdict, "unverified": reasons}
        return {**common, "tree": trees[0]} if len(trees) == 1 else {**common, "models": trees}

    def _audited(self, found: Found) -> Finding:
        store = Store(self.project.store)
        finding = audit_found(found, store, from_remote=self.remote, signers=self.signers, signed=self.signed)
        if self.again:
            finding.parts.append(self._rebuilt(found))
        return finding

    def _rebuilt(self, found: Found) -> Finding:
        path = found.path / LINEAGE
        lineage = check_lineage(read_json(path), str(path)) if path.is_file() else {}
        if "recipe" not in lineage:
            raise CameraError(
                f"{found.label}: --rebuild needs a published folder, whose {LINEAGE} holds the recipe"
            )
        body = {name: value for name, value in lineage.items() if name != "digest"}
        if digest_json(body) != lineage["digest"]:
            raise CameraError(
                f"{path} was changed after publishing: a recipe that may be another's is not run"
            )
        from tasks.audit.rebuild import rebuild  # brings torch, which a plain audit does not need

        return rebuild(lineage, self.project.home, lambda step: note(f"rebuilding {step}"))


def comparison_tables(found: "Comparison", before: str, after: str) -> Iterator[Table | Text]:
    """What a terminal shows of a comparison."""
    if not found.changes:
        yield Text("nothing changed")
    else:
        table = Table(box=None, pad_edge=False)
        for column in ("", "what", before, after, "change"):
            table.add_column(column, overflow="fold")
        section = ""
        for change in found.changes:
            heading, section = (change.section if change.section != section else ""), change.section
            table.add_row(
                heading,
                change.what,
                _cell(change, change.before),
                _cell(change, change.after),
                _percent(change),
            )
        yield table
    if found.no_overlap is not None:
        yield Text(f"\nkept channels were not compared: {found.no_overlap}")
        return
    table = Table(title="Kept channels", title_justify="left", box=None, pad_edge=False)
    for column in ("layer", before, after, "in both", "share of all that either keeps"):
        table.add_column(column, justify="right")
    for layer in found.overlap:
        table.add_row(
            str(layer.layer),
            str(layer.before),
            str(layer.after),
            str(layer.both),
            f"{100 * layer.share:.1f} %",
        )
    yield table


def _cell(change: "Change", value: Any) -> str:
    if value is None:
        return "–"
    return bytes_text(value) if change.what == "bytes" else str(value)


def _percent(change: "Change") -> str:
    numbers = change.before, change.after
    if change.section in ("quality", "speed", "size") and all(
        isinstance(value, int | float) for value in numbers
    ):
        return f"{100 * (change.after / change.before - 1):+.1f} %" if change.before else ""
    return ""
