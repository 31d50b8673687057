"""`camera doctor`: this machine, and the pipeline where it is installed."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import typer

from camera.cli.options import Json
from camera.cli.output import print_json, print_table
from camera.escape import one_line

if TYPE_CHECKING:
    from camera.doctor import Finding

_MARKS = {"ok": ("✓", "green"), "warn": ("!", "yellow"), "missing": ("–", "dim")}


def doctor(as_json: Json = False) -> None:
    """Show versions, devices and why one is missing, where things are kept, and free disk.

    On an Ascend host also CANN, driver and firmware, whether the versions pair, who uses which card, and settings. The
    exit code is 1 where something is missing (–) without which commands fail.

    Example: `camera doctor --json`
    """
    from camera.cli import pipeline
    from camera.doctor import diagnose

    joined = pipeline()
    findings = [*diagnose(), *(joined.places() if joined else ())]
    if as_json:
        print_json(findings)
    else:
        _print(findings)
    if any(finding.status == "missing" for finding in findings):
        raise typer.Exit(1)


def _print(findings: "Iterable[Finding]") -> None:
    from rich.text import Text

    rows: list[tuple[str | Text, ...]] = []
    section = ""
    for finding in findings:
        heading, section = ("" if finding.section == section else finding.section), finding.section
        rows.append((heading, Text(*_MARKS[finding.status]), finding.name, finding.detail))
        if finding.advice:
            rows.append(("", "", "", Text(f"→ {one_line(finding.advice)}", "yellow")))
    print_table(("", "", "", ""), rows)
