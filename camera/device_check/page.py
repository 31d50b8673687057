"""report.html: the verdicts first, then what was measured, as drawings; one file that needs nothing beside it."""

from collections.abc import Iterator
from typing import Any

from camera.device_check.schema import CheckReport, Measurement, StepRecord
from camera.report.html import Bar, Bars
from camera.report.table import Grid
from camera.report.templates import render
from camera.units import bytes_text, seconds_text

_TOKEN, _PRODUCT, _HOST_TIME = "time of a token", "time of a product", "host time of a launch"
_MARKS = {"passed": "✓ passed", "failed": "✗ failed", "timed out": "✗ timed out", "skipped": "– skipped"}


def render_page(report: CheckReport) -> str:
    """The page. Equal reports give equal bytes."""
    return render(
        "device_check.html.j2",
        results={"name": report.name},
        report=report,
        verdict=_verdict(report),
        verdicts=_verdicts(report),
        reasons=list(_reasons(report)),
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
    """Of what applies and was asked for; the others are named below."""
    shown = [step for step in report.steps if step.verdict != "skipped" or not step.fine]
    rows = tuple(
        (
            step.title,
            _MARKS[step.verdict],
            seconds_text(step.seconds) if step.verdict != "skipped" else "",
        )
        for step in shown
    )
    strong = tuple(index for index, step in enumerate(shown) if not step.fine)
    others = [f"{step.title}: {step.cause}" for step in report.steps if step not in shown]
    return Grid("Verdicts", ("step", "verdict", "time"), rows, words=2, strong=strong, notes=tuple(others))


def _reasons(report: CheckReport) -> Iterator[tuple[str, str, str]]:
    """Of every step that did not pass: title, cause, advice."""
    for step in report.steps:
        if not step.fine:
            yield step.title, step.cause, step.advice


def _tiles(report: CheckReport) -> Iterator[tuple[str, str, str]]:
    """Number, what it is, and what it is read beside."""
    if bandwidth := _bandwidth(report):
        yield f"{number(bandwidth / 1e9)} GB/s", "bandwidth", "by copies"
    if step := report.step("launch-cost"):
        first = step.values(_HOST_TIME)[0].of["operator"]
        times = {one.of["way"]: one.value for one in step.values(_HOST_TIME) if one.of["operator"] == first}
        captured = f"{number(times['captured'])} µs in a graph" if "captured" in times else "host time"
        yield f"{number(times['eager'])} µs", "to launch an operator", captured
    decoders = _decoders(report)
    for step, title in [*decoders[:1], *decoders[1:][-1:]]:
        best = min((one.value for one in step.values(_TOKEN) if one.value is not None), default=None)
        if best is not None:
            floor = _floor(report, step)
            beside = "" if floor is None else f"{floor / best:.0%} of the bandwidth"
            yield f"{number(best)} ms", f"a token, {title}", beside


def _decode_bars(report: CheckReport) -> Iterator[Bars]:
    """Every format, eager and captured, beside what its bytes take."""
    bars = []
    for step, title in _decoders(report):
        for one in step.values(_TOKEN):
            if one.value is not None:
                way = str(one.of["way"])
                bars.append(Bar(f"{title}, {way}", one.value, number(one.value), way == "captured"))
        if (floor := _floor(report, step)) is not None:
            bars.append(Bar(f"{title}, floor", floor, number(floor)))
    if bars:
        layers = next(one.value for step, _ in _decoders(report) for one in step.values("layers"))
        note = f"ms a token, {layers:.0f} layers; floor: bytes of a token over the measured bandwidth"
        yield Bars("Time of a token", note, tuple(bars))
    launches = [
        Bar(title, one.value or 0, f"{one.value:.0f}")
        for step, title in _decoders(report)
        for one in step.values("launches of a token")
    ]
    if launches:
        yield Bars("Launches of a token", "operators that compute something, eager", tuple(launches))


def _kernel_bars(report: CheckReport) -> Iterator[Bars]:
    """For each matrix the ways to multiply one token with it."""
    step = report.step("int4-kernels")
    found = [] if step is None else [one for one in step.values(_PRODUCT) if one.of["tokens"] == 1]
    judged = [] if step is None else step.values("ways that are right")
    for matrix in dict.fromkeys(one.of["matrix"] for one in judged):
        ours = [one for one in found if one.of["matrix"] == matrix and one.value is not None]
        # Launched one by one, a product's time has its launch in it: no equal of one that was recorded.
        recorded = [one for one in ours if one.of["recorded"] == "True"]
        fastest = min(recorded or ours, key=lambda one: one.value or 0, default=None)
        bars = tuple(
            Bar(
                _way(one) + (", with its launch" if recorded and one not in recorded else ""),
                one.value or 0,
                number(one.value),
                one is fastest,
            )
            for one in ours
        )
        if bars:
            yield Bars(str(matrix), "µs for one token; bold: the fastest", bars)


def _launch_bars(report: CheckReport) -> Iterator[Bars]:
    step = report.step("launch-cost")
    for what, title in (
        (_HOST_TIME, "Host time of a launch"),
        ("time of a launch", "Until the device is done"),
    ):
        bars = tuple(
            Bar(
                f"{one.of['operator']}, {one.of['way']}",
                one.value or 0,
                number(one.value),
                one.of["way"] == "captured",
            )
            for one in (step.values(what) if step else ())
        )
        if bars:
            yield Bars(title, "µs, of many queued together", bars)


def _pruning_bars(report: CheckReport) -> Iterator[Bars]:
    step = report.step("walk")
    if step is not None:
        plain = [
            Bar("plain forward pass", one.value or 0, words(one)) for one in step.values("plain forward pass")
        ]
        pruned = [
            Bar(f"pruning, {one.of['propagation']}", one.value or 0, words(one), strong=True)
            for one in step.values("pruning")
        ]
        tokens = next(one.value or 0 for one in step.values("calibration tokens"))
        yield Bars("Pruning", f"{tokens:.0f} calibration tokens", (*plain, *pruned))


def _way(one: Measurement) -> str:
    """How a product was computed."""
    kind, way = str(one.of["type"]), str(one.of["way"])
    return way if kind == way else f"{kind}, {way}"


def _decoders(report: CheckReport) -> list[tuple[StepRecord, str]]:
    """The steps that decoded, and of what."""
    found = [report.step(step.name) for step in report.steps if step.name.startswith("decode-")]
    return [(step, step.title.partition(", ")[2]) for step in found if step is not None]


def _bandwidth(report: CheckReport) -> float | None:
    """Bytes a second."""
    step = report.step("bandwidth")
    return None if step is None else next(1e9 * (one.value or 0) for one in step.values("copy bandwidth"))


def _floor(report: CheckReport, step: StepRecord) -> float | None:
    """Milliseconds that the bytes of a token take."""
    bandwidth = _bandwidth(report)
    return bandwidth and next(1000 * (one.value or 0) / bandwidth for one in step.values("bytes of a token"))


def number(value: float | None) -> str:
    """Three digits, and no power of ten for what people read without."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}"


def words(one: Measurement) -> str:
    """A figure as people read it."""
    if one.value is None:
        return "–"
    if one.unit == "B":
        return bytes_text(one.value)
    if one.unit == "s":
        return seconds_text(one.value) if one.value >= 0.1 else f"{1000 * one.value:.3g} ms"
    return f"{number(one.value)} {one.unit}".strip()


def _figures(step: StepRecord) -> Grid:
    """All figures of a step, in the columns that any of them fills."""
    columns = {
        "figure": [one.what for one in step.measurements],
        "of": [", ".join(filter(None, map(str, one.of.values()))) for one in step.measurements],
        "value": [words(one) if one.error is None else "–" for one in step.measurements],
        "must be": [_bound(one) for one in step.measurements],
        "published": ["" if one.beside is None else f"{one.beside:.4g}" for one in step.measurements],
    }
    filled = {name: cells for name, cells in columns.items() if any(cells)}
    strong = tuple(index for index, one in enumerate(step.measurements) if not one.holds and not one.optional)
    return Grid(
        step.title,
        tuple(filled),
        tuple(zip(*filled.values(), strict=True)),
        words=2 if "of" in filled else 1,
        strong=strong,
        notes=tuple(f"{one.name}: {one.error}" for one in step.measurements if one.error is not None),
    )


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


_SECTIONS = (
    ("Decoding", "One sequence, random weights at the model's shapes.", _decode_bars),
    ("4-bit kernels", "One token times one matrix, every way that is right on this device.", _kernel_bars),
    ("Launches", "What the host pays for an operator, whatever that computes.", _launch_bars),
    ("Pruning", "Two layers, from disk to disk, beside a plain forward pass of them.", _pruning_bars),
)
