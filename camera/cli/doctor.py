"""`camera doctor`: this machine, and the pipeline where it is installed."""

from camera.cli.output import print_json
from camera.cli.parameters import Json

_MARKS = {"ok": ("✓", "green"), "warn": ("!", "yellow"), "missing": ("–", "dim")}


def doctor(as_json: Json = False) -> None:
    """Show versions, devices and why one is missing, where things are kept, and free disk.

    Example: `camera doctor --json`
    """
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from camera.cli import pipeline
    from camera.doctor import diagnose

    joined = pipeline()
    findings = [*diagnose(), *(joined.places() if joined else ())]
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
