"""Looking closer: at a published model, and at two of them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from camera.cli.options import Json
from camera.cli.output import make_console, note, print_json, print_table, say
from camera.escape import one_line
from flows.commands.shared import Signers, check_signers, here

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.tree import Tree

    from camera.doctor import Finding as Diagnosis
    from tasks.audit.finding import Finding, Verdict
    from tasks.diff import Change

_STYLES: "dict[Verdict, tuple[str, str]]" = {
    "verified": ("✓", "green"),
    "attested": ("✓", "green"),
    "consistent": ("≈", "yellow"),
    "unverifiable": ("?", "yellow"),
    "wrong": ("✗", "bold red"),
}


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
    sources: Annotated[
        bool,
        typer.Option(
            "--sources",
            help="Look for sources wherever the lineage says, also where this project never read them.",
        ),
    ] = False,
    signers: Signers = None,
    require_signature: Annotated[
        bool, typer.Option("--require-signature", help="Without a valid signature it is wrong.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Of earlier versions: exit code 3 is given without it.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Walk a lineage back to its sources and hash again all that is found.

    Each part is verified (✓: recomputed from bytes that are verified), attested (✓: signed by a key in --signers), consistent
    (≈: nobody but the publication itself says so), unverifiable (?: why), or wrong (✗: what). The first line has the
    weakest verdict and what it stands on.

    Exit code 0: all is verified or attested; 1: something is wrong, and is named; 2: there is no lineage; 3: nothing is
    wrong, and something is only consistent or unverifiable.

    Examples: `camera audit published/tiny-openpangu-p20`  `camera audit tiny@production --remote`
    `camera audit --all --json`
    """
    from camera.errors import CameraError
    from flows.commands.auditing import as_document, audited, exit_code, overall, parts, summary
    from tasks import signing
    from tasks.store import Store

    if (model is None) is not everything:
        raise CameraError("give one model, or --all")
    project = here()
    store = Store(project.store)
    check_signers(signing.trust(store, signers).signers, require_signature)
    how = {"from_remote": remote, "signers": signers, "signed": require_signature, "everywhere": sources}
    found = audited(model, published, project.home, store, rebuild=rebuild, **how)
    if as_json:
        print_json(as_document(found))
    else:
        verdict = overall(found)
        say(f"{_STYLES[verdict][0]} {verdict}: {one_line(summary(found))}")
        for finding in found:
            make_console().print(_tree(finding))
            say(_counts(finding))
    for part in parts(found, "wrong"):
        note(f"does not match: {one_line(f'{part.name}: {part.detail}')}")
    raise typer.Exit(exit_code(found))


def _counts(finding: "Finding") -> str:
    """How many parts have each verdict."""
    counts = {verdict: len(finding.all_of(verdict)) for verdict in _STYLES}
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)


def _tree(finding: "Finding", tree: "Tree | None" = None) -> "Tree":
    from rich.text import Text
    from rich.tree import Tree

    mark, style = _STYLES[finding.verdict]
    detail = f"  {one_line(finding.detail)}" if finding.detail else ""
    label = Text.assemble((mark, style), " ", one_line(finding.name), (detail, "dim"))
    branch = Tree(label) if tree is None else tree.add(label)
    for part in finding.parts:
        _tree(part, branch)
    return branch


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
    from tasks.diff import compare
    from tasks.published import located
    from tasks.store import Store

    store = Store(here().store)
    with located(before) as first, located(after) as second:
        found = compare(first.path, second.path, store)
    if as_json:
        layers = [{**vars(layer), "share": layer.share} for layer in found.overlap]
        print_json({**vars(found), "before": before, "after": after, "overlap": layers})
        return
    rows, section = [], ""
    for change in found.changes:
        heading, section = ("" if change.section == section else change.section), change.section
        rows.append((heading, change.what, *_values(change)))
    if rows:
        print_table(("", "what", before, after, "change"), rows)
    else:
        say("nothing changed")
    if found.no_overlap is not None:
        say("")
        say(f"kept channels were not compared: {found.no_overlap}")
        return
    print_table(
        (">layer", f">{before}", f">{after}", ">in both", ">share of all that either keeps"),
        (
            (*map(str, (layer.layer, layer.before, layer.after, layer.both)), f"{100 * layer.share:.1f} %")
            for layer in found.overlap
        ),
        title="Kept channels",
    )


def _values(change: "Change") -> tuple[str, str, str]:
    """Before, after, and by how much a measurement changed."""
    from camera.units import bytes_text

    text = bytes_text if change.what == "bytes" else str
    before, after = ("–" if value is None else text(value) for value in (change.before, change.after))
    measured = change.section in ("quality", "speed", "size") and change.before
    if measured and all(isinstance(value, int | float) for value in (change.before, change.after)):
        return before, after, f"{100 * (change.after / change.before - 1):+.1f} %"
    return before, after, ""


def places() -> "Iterator[Diagnosis]":
    """What `camera doctor` says of the pipeline here: its packages, and where things are kept."""
    import shutil

    from camera.doctor import Finding as Diagnosis
    from camera.doctor import installed_packages
    from camera.units import bytes_text
    from tasks import versioning
    from tasks.project import PACKAGES

    project = here()
    yield from installed_packages(PACKAGES)
    free = bytes_text(shutil.disk_usage(project.home).free)
    yield Diagnosis("places", "store", "ok", f"{project.store} ({free} free)")
    yield Diagnosis("places", "mlflow", "ok", project.mlflow_shown)
    yield Diagnosis("places", "prefect", "ok", project.prefect_api)
    if root := versioning.repository_root(Path.cwd()):
        yield Diagnosis("places", "dvc", "ok", str(root))
    else:
        advice = "run `dvc init` to version published models"
        yield Diagnosis("places", "dvc", "warn", "no DVC repository here", advice)
