"""Making room in the artifact store."""

import re
from typing import Annotated

import typer

from camera.cli.options import Json
from camera.cli.output import print_json, print_table, say
from camera.escape import one_line
from flows.commands.shared import here

_UNITS = {
    "time": ("12h, 30d or 4w", {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}),
    "size": ("500MB or 1.5TB", {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}),
}


def _amount(kind: str, text: str) -> float:
    examples, units = _UNITS[kind]
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]?)", text.strip().lower().removesuffix("b"))
    if found is None or found[2] not in units:
        raise typer.BadParameter(f"{text} is no {kind}: write {examples}")
    return float(found[1]) * units[found[2]]


def _age(text: str) -> float:
    return _amount("time", text)


def _size(text: str) -> int:
    return int(_amount("size", text))


def gc(
    older_than: Annotated[
        float, typer.Option(parser=_age, metavar="TIME", help="What was not used for so long goes.")
    ] = "30d",  # type: ignore[assignment]  # typer parses defaults too
    max_size: Annotated[
        int | None,
        typer.Option(
            parser=_size,
            metavar="SIZE",
            help="While the store is larger, younger things go too, the longest unused first.",
            show_default=False,
        ),
    ] = None,
    keep_runs: Annotated[
        float,
        typer.Option(
            parser=_age, metavar="TIME", help="Runs that were at work in this time keep their artifacts."
        ),
    ] = "30d",  # type: ignore[assignment]
    intermediates: Annotated[
        bool,
        typer.Option("--intermediates", help="Also what published models were made of and no longer need."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would go.")] = False,
    as_json: Json = False,
) -> None:
    """Evict from the store what no published model, kept run or running job refers to; clean what kills left behind.

    A run is kept if it was at work within --keep-runs, or if it has the tag camera.keep=true in MLflow; delete a run in
    MLflow to let its artifacts go. What is evicted keeps its manifest and lineage: audits say `evicted`, and a later run
    goes on from what follows it. Safe beside runs that are at work.

    Exit code 0: done; 2: MLflow cannot be asked which runs are kept; 3: --max-size is not reached, because what is left
    is referred to.

    Examples: `camera gc --dry-run`  `camera gc --older-than 7d --max-size 500GB --intermediates`
    """
    from camera.units import bytes_text
    from tasks.gc import collect, references
    from tasks.store import Store

    store = Store(here().store)
    done = collect(
        store,
        references(store, keep_runs),
        older_than=older_than,
        max_size=max_size,
        intermediates=intermediates,
        dry_run=dry_run,
    )
    too_big = max_size is not None and done.size_after > max_size
    if as_json:
        print_json({**vars(done), "dry_run": dry_run, "reached": not too_big})
    else:
        if done.removed:
            print_table(
                ("", "name", ">size", ">unused", "why"),
                (
                    (
                        gone.kind,
                        gone.name,
                        bytes_text(gone.size_bytes),
                        _days(gone.unused_seconds),
                        gone.why,
                    )
                    for gone in done.removed
                ),
            )
        freed = bytes_text(sum(gone.size_bytes for gone in done.removed))
        verb, left = "would go" if dry_run else "removed", bytes_text(done.size_after)
        say(f"{verb}: {freed} in {len(done.removed)} pieces; artifacts left: {left}")
        for reason, size in sorted(done.kept.items(), key=lambda kept: -kept[1]):
            say(f"  stays: {bytes_text(size):>9}  {one_line(reason)}")
        if max_size is not None and too_big:
            limit = bytes_text(max_size)
            say(f"--max-size {limit} is not reached: the rest is referred to (see --intermediates)")
    if too_big:
        raise typer.Exit(3)


def _days(seconds: float) -> str:
    return f"{seconds / 86400:.1f} d" if seconds >= 86400 else f"{seconds / 3600:.1f} h"
