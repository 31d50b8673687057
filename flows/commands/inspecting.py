"""Looking closer: at a published model, and at this machine."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.commands.common import print_json, say
from flows.commands.flags import Json

if TYPE_CHECKING:
    from rich.tree import Tree

    from tasks.audit import Finding

_STYLES = {"ok": ("✓", "green"), "wrong": ("✗", "bold red"), "unverified": ("?", "yellow")}
_MARKS = {"ok": ("✓", "green"), "warn": ("!", "yellow"), "missing": ("–", "dim")}


def audit(
    path: Annotated[
        Path, typer.Argument(help="A published folder, a GGUF, or an artifact.", show_default=False)
    ],
    as_json: Json = False,
) -> None:
    """Walk a lineage back to its sources and hash again all that is found.

    Exit code 0: nothing is wrong; 1: something is, and is named; 2: there is no lineage.

    Example: `camera audit published/tiny-openpangu-p20`
    """
    from dataclasses import asdict

    from rich.console import Console

    from tasks.audit import audit as run
    from tasks.project import Project
    from tasks.store import Store

    project = Project.here()
    project.configure()
    found = run(path, Store(project.store))
    wrong, unverified = found.all_of("wrong"), found.all_of("unverified")
    if as_json:
        print_json({"verdict": "wrong" if wrong else "ok", "tree": asdict(found)})
    else:
        Console().print(_tree(found))
        verified = len(found.all_of("ok"))
        say(f"{verified} parts verified, {len(unverified)} could not be verified here, {len(wrong)} wrong")
    for finding in wrong:
        sys.stderr.write(f"does not match: {finding.name}: {finding.detail}\n")
    if wrong:
        raise typer.Exit(1)


def _tree(finding: "Finding", tree: "Tree | None" = None) -> "Tree":
    from rich.text import Text
    from rich.tree import Tree

    mark, style = _STYLES[finding.verdict]
    label = Text.assemble(
        (mark, style), " ", finding.name, (f"  {finding.detail}" if finding.detail else "", "dim")
    )
    branch = Tree(label) if tree is None else tree.add(label)
    for part in finding.parts:
        _tree(part, branch)
    return branch


def doctor(as_json: Json = False) -> None:
    """Show versions, devices and why one is missing, where things are kept, and free disk.

    Example: `camera doctor --json`
    """
    import shutil
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from camera.doctor import Finding as Diagnosis
    from camera.doctor import diagnose
    from camera.units import bytes_text
    from tasks import versioning
    from tasks.project import Project

    project = Project.here()
    project.configure()
    root = versioning.repository_root(Path.cwd())
    free = bytes_text(shutil.disk_usage(project.home).free)
    findings = [
        *diagnose(),
        Diagnosis("places", "store", "ok", f"{project.store} ({free} free)", ""),
        Diagnosis("places", "mlflow", "ok", project.mlflow_uri, ""),
        Diagnosis("places", "prefect", "ok", project.prefect_api, ""),
        Diagnosis("places", "dvc", "ok", str(root), "")
        if root
        else Diagnosis(
            "places", "dvc", "warn", "no DVC repository here", "run `dvc init` to version published models"
        ),
    ]
    if as_json:
        print_json([asdict(finding) for finding in findings])
        return
    table = Table(box=None, pad_edge=False)
    for column in ("", "", "", ""):
        table.add_column(column, overflow="fold")
    section = ""
    for finding in findings:
        mark, style = _MARKS[finding.status]
        heading = finding.section if finding.section != section else ""
        section = finding.section
        table.add_row(heading, f"[{style}]{mark}[/]", finding.name, finding.detail)
        if finding.advice:
            table.add_row("", "", "", f"→ {finding.advice}", style="yellow")
    Console().print(table)
