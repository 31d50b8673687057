"""Looking closer: at a published model, and at two of them."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from camera.cli.output import print_json, say
from camera.cli.parameters import Json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.tree import Tree

    from camera.doctor import Finding as Diagnosis
    from tasks.audit.finding import Finding, Verdict

_STYLES = {"ok": ("✓", "green"), "wrong": ("✗", "bold red"), "unverified": ("?", "yellow")}


def audit(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A published folder, a GGUF or an artifact; or a name in the registry: tiny, tiny@3, tiny@production.",
            show_default=False,
        ),
    ] = None,
    everything: Annotated[
        bool,
        typer.Option("--all", help="Every published model: below --published, and every registry version."),
    ] = False,
    published: Annotated[Path, typer.Option(help="For --all: where models are published.")] = Path(
        "published"
    ),
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Run its recipe again in a clean store and compare the weights.")
    ] = False,
    remote: Annotated[
        bool,
        typer.Option("--remote", help="Read what DVC versions again from its remote, though it is here."),
    ] = False,
    signers: Annotated[
        Path | None, typer.Option(help="ssh's allowed signers, whose signatures count.", show_default=False)
    ] = None,
    require_signature: Annotated[
        bool, typer.Option("--require-signature", help="Without a valid signature it is wrong.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 3 if any part could not be verified.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Walk a lineage back to its sources and hash again all that is found.

    Each part is right (✓), wrong (✗), or could not be verified here (?), with the reason: evicted, absent, offline,
    untracked, superseded, other versions.

    Exit code 0: nothing is wrong; 1: something is, and is named; 2: there is no lineage; 3, with --strict: nothing is
    wrong, and something could not be verified.

    Examples: `camera audit published/tiny-openpangu-p20`  `camera audit tiny@production --remote --strict`
    `camera audit --all --json`
    """
    from rich.console import Console

    from camera.errors import CameraError
    from flows.commands.auditing import Audit
    from tasks.project import Project

    if (model is None) is not everything:
        raise CameraError("give one model, or --all")
    if require_signature and signers is None:
        raise CameraError("--require-signature needs --signers: ssh's list of whose signatures count")
    project = Project.here()
    project.configure()
    asked = Audit(project, remote, signers, require_signature, rebuild)
    found = asked.everything(published) if model is None else [asked.one(model)]
    if as_json:
        print_json(asked.document(found))
    else:
        for finding in found:
            Console().print(_tree(finding))
            say(summary([finding]))
        if everything:
            say(f"{len(found)} published models: {summary(found)}")
    wrong = [part for finding in found for part in finding.all_of("wrong")]
    for part in wrong:
        sys.stderr.write(f"does not match: {part.name}: {part.detail}\n")
    if wrong:
        raise typer.Exit(1)
    if strict and any(finding.all_of("unverified") for finding in found):
        raise typer.Exit(3)


def summary(found: "list[Finding]") -> str:
    """How many parts are right, wrong, and neither."""

    def count(verdict: "Verdict") -> int:
        return sum(len(finding.all_of(verdict)) for finding in found)

    return f"{count('ok')} parts verified, {count('unverified')} could not be verified here, {count('wrong')} wrong"


def diff(
    before: Annotated[
        str, typer.Argument(help="A published folder, or a name: tiny, tiny@3.", show_default=False)
    ],
    after: Annotated[str, typer.Argument(help="Another.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Show what changed between two published models: recipe, data, code, versions, kept channels, quality, speed.

    Examples: `camera diff published/a published/b`  `camera diff tiny@1 tiny@2 --json`
    """
    from dataclasses import asdict

    from flows.commands.auditing import comparison_tables
    from tasks.diff import compare
    from tasks.project import Project
    from tasks.published import located
    from tasks.store import Store

    project = Project.here()
    project.configure()
    with located(before) as first, located(after) as second:
        found = compare(first.path, second.path, Store(project.store))
    if as_json:
        layers = [{**asdict(layer), "share": layer.share} for layer in found.overlap]
        print_json({**asdict(found), "before": before, "after": after, "overlap": layers})
        return
    from rich.console import Console

    for table in comparison_tables(found, before, after):
        Console().print(table)


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


def places() -> "Iterator[Diagnosis]":
    """What `camera doctor` says of the pipeline here: where things are kept."""
    import shutil

    from camera.doctor import Finding as Diagnosis
    from camera.units import bytes_text
    from tasks import versioning
    from tasks.project import Project

    project = Project.here()
    project.configure()
    free = bytes_text(shutil.disk_usage(project.home).free)
    yield Diagnosis("places", "store", "ok", f"{project.store} ({free} free)")
    yield Diagnosis("places", "mlflow", "ok", project.mlflow_shown)
    yield Diagnosis("places", "prefect", "ok", project.prefect_api)
    if root := versioning.repository_root(Path.cwd()):
        yield Diagnosis("places", "dvc", "ok", str(root))
    else:
        advice = "run `dvc init` to version published models"
        yield Diagnosis("places", "dvc", "warn", "no DVC repository here", advice)
