"""`camera doctor`: this machine, and the pipeline where it is installed."""

from camera.cli.options import Json
from camera.cli.output import print_json, print_table

_MARKS = {"ok": ("✓", "green"), "warn": ("!", "yellow"), "missing": ("–", "dim")}


def doctor(as_json: Json = False) -> None:
    """Show versions, devices and why one is missing, where things are kept, and free disk.

    Example: `camera doctor --json`
    """
    from rich.text import Text

    from camera.cli import pipeline
    from camera.doctor import diagnose

    joined = pipeline()
    findings = [*diagnose(), *(joined.places() if joined else ())]
    if as_json:
        print_json(findings)
        return
    rows: list[tuple[str | Text, ...]] = []
    section = ""
    for finding in findings:
        heading, section = ("" if finding.section == section else finding.section), finding.section
        rows.append((heading, Text(*_MARKS[finding.status]), finding.name, finding.detail))
        if finding.advice:
            rows.append(("", "", "", Text(f"→ {finding.advice}", "yellow")))
    print_table(("", "", "", ""), rows)
