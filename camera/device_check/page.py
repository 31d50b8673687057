"""report.html: the verdicts first, then what was measured, as drawings; one file that needs nothing beside it."""

from collections.abc import Iterator
from typing import Any

from camera.device_check.schema import CheckReport, Measurement, StepRecord
from camera.report.table import Grid
from camera.report.templates import render
from camera.units import bytes_text, seconds_text

_MARKS = {"passed": "✓ passed", "failed": "✗ failed", "timed out": "✗ timed out", "skipped": "– skipped"}


def render_page(report: CheckReport) -> str:
    """The page. Equal reports give equal bytes."""
    return render(
        "device_check.html.j2",
        results={"name": report.name},
        report=report,
        verdict=_verdict(report),
        verdicts=_verdicts(report),
        tiles=list(_tiles(report)),
        sections=[(title, lead, list(bars(report))) for title, lead, bars in _SECTIONS],
        figures=[(step.title, _figures(step)) for step in report.steps if step.measurements],
        facts=list(_facts(report)),
    )


def _verdict(report: CheckReport) -> str:
    ran = [step for step in report.steps if step.verdict != "skipped"]
    bad = [step for step in report.steps if not step.fine]
    if not bad:
        return f"All {len(ran)} steps that apply here passed."
    failed = [step.title for step in bad if step.verdict != "skipped"]
    return f"{len(ran) - len(failed)} of {len(ran)} steps passed; not: {', '.join(failed)}."


def _verdicts(report: CheckReport) -> Grid:
    rows = tuple(
        (
            step.title,
            _MARKS[step.verdict],
            " → ".join(filter(None, (step.cause, step.advice))) or "–",
            seconds_text(step.seconds) if step.verdict != "skipped" else "",
        )
        for step in report.steps
    )
    strong = tuple(index for index, step in enumerate(report.steps) if not step.fine)
    return Grid("Verdicts", ("step", "verdict", "why", "time"), rows, words=3, strong=strong)


def _tiles(report: CheckReport) -> Iterator[tuple[str, str, str]]:
    """Number, what it is, and what it is read beside."""
    if (step := report.step("bandwidth")) and (found := step.values("copy bandwidth")):
        yield words(found[0]), "bandwidth", "by copies"


def words(one: Measurement) -> str:
    """A figure as people read it."""
    if one.value is None:
        return "–"
    if one.unit == "B":
        return bytes_text(one.value)
    if one.unit == "s":
        return seconds_text(one.value) if one.value >= 0.1 else f"{1000 * one.value:.3g} ms"
    return f"{one.value:.4g} {one.unit}".strip()


def _figures(step: StepRecord) -> Grid:
    """All figures of a step."""
    rows = tuple(
        (
            one.what,
            ", ".join(map(str, one.of.values())),
            words(one) if one.error is None else "–",
            _bound(one),
            one.error or "",
        )
        for one in step.measurements
    )
    strong = tuple(index for index, one in enumerate(step.measurements) if not one.holds and not one.optional)
    return Grid(step.title, ("figure", "of", ">value", "must be", "error"), rows, words=2, strong=strong)


def _bound(one: Measurement) -> str:
    bounds = [
        f"{sign} {bound:.3g}"
        for sign, bound in (("≥", one.at_least), ("≤", one.at_most))
        if bound is not None
    ]
    return ", ".join(bounds)


def _facts(report: CheckReport) -> Iterator[tuple[str, str]]:
    """What the host said of itself."""
    identity: dict[str, Any] = report.host.get("identity", {})
    for name in (
        "soc",
        "cann",
        "driver",
        "firmware",
        "torch",
        "torch_npu",
        "unpaired",
        "python",
        "cores",
        "kernel",
    ):
        if identity.get(name) is not None:
            yield name.replace("_", "-"), str(identity[name])
    for name, value in {**identity.get("packages", {}), **identity.get("environment", {})}.items():
        if name not in ("torch", "torch-npu"):
            yield name, str(value)


_SECTIONS: tuple[Any, ...] = ()
