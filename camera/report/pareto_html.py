"""The report of a sweep: one HTML file that needs nothing beside it, and the same results as JSON and CSV."""

import csv
import math
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from camera.files import read_json, whole_file, write_json
from camera.report.html import Figure
from camera.report.pareto import SweepResults, SweepRow
from camera.report.pareto_chart import Dot, pareto
from camera.report.pareto_table import columns, csv_rows, lines
from camera.report.schema import ModelRow
from camera.report.words import milliseconds, perplexity_words, score_words
from camera.units import bytes_text

HTML, JSON, CSV = "sweep.html", "sweep.json", "sweep.csv"
_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes"))
_FAR = 1.6
"""An original so many times as large as the largest member is a line, not a dot: the members would be one spot."""


def write_sweep(results: SweepResults, out: Path) -> None:
    """Write `sweep.html`, `sweep.json` and `sweep.csv` into an existing folder."""
    write_json(out / JSON, results.model_dump(mode="json"))
    with whole_file(out / CSV) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(csv_rows(results))
    with whole_file(out / HTML) as temporary:
        temporary.write_text(render_sweep(results), encoding="utf-8")


def read_sweep(path: Path) -> SweepResults:
    """Read a `sweep.json` that `write_sweep` wrote."""
    return SweepResults.model_validate(read_json(path))


def render_sweep(results: SweepResults) -> str:
    """The page. Equal results give equal bytes."""
    environment = Environment(
        loader=PackageLoader("camera", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("sweep.html.j2").render(
        results=results,
        summary=summary(results),
        columns=columns(results),
        words=1 + len(results.varied),
        lines=lines(results),
        figures=_figures(results),
        noisy=any(row.noisy for row in results.rows),
    )


def summary(results: SweepResults) -> str:
    """One sentence: how many members, how many failed, and which are worth a look."""
    count, failed = len(results.rows), len(results.failed)
    best = [row.label for row in results.rows if row.on_front]
    parts = [f"{count} member{'s' if count != 1 else ''} over {' × '.join(results.varied)}"]
    if failed:
        parts.append(f"{failed} failed")
    refused = sum(row.gate == "failed" for row in results.rows)
    if refused:
        parts.append(f"{refused} fail{'s' if refused == 1 else ''} the quality gate")
    if best:
        parts.append(f"on the Pareto front of size and perplexity: {', '.join(best)}")
    elif len(results.failed) < count:
        parts.append("none on the Pareto front: the unpruned models are as small and better")
    return "; ".join(parts) + "."


def _figures(results: SweepResults) -> list[Figure]:
    by_size = [figure for text in results.texts if (figure := _by_size(results, text)) is not None]
    return by_size + [figure for text in results.texts if (figure := _by_time(results, text)) is not None]


def _by_size(results: SweepResults, text: str) -> Figure | None:
    members = [
        (row, row.model, row.model.bytes)
        for row in results.rows
        if row.model is not None and row.model.bytes and _drawable(row.model, text)
    ]
    if not members:
        return None
    largest = max(size for _, _, size in members)
    near: list[tuple[ModelRow, int]] = []
    far: list[tuple[ModelRow, int]] = []
    for model in results.references:
        if model.bytes and _drawable(model, text):
            (far if model.bytes > _FAR * largest else near).append((model, model.bytes))
    scale, unit = next((scale, unit) for scale, unit in _UNITS if largest >= scale)
    on_front = results.references_on_front.get(text, ())
    dots = [_reference_dot(model, text, size / scale, model.id in on_front) for model, size in near] + [
        _dot(row, model, text, size / scale, bytes_text(size)) for row, model, size in members
    ]
    title = f"Perplexity on {text} against size"
    return Figure(
        title,
        pareto(title, dots, f"size, {unit}", _far_line(far, text)),
        "lower and further left is better; the line joins the models that no other beats; squares were not pruned",
    )


def _by_time(results: SweepResults, text: str) -> Figure | None:
    timed = [
        (row, row.model, row.decode_ms)
        for row in results.rows
        if row.model is not None and row.decode_ms and _drawable(row.model, text)
    ]
    if len(timed) < 2:
        return None
    dots = [
        _dot(row, model, text, decode, f"{milliseconds(decode)} ms per token") for row, model, decode in timed
    ]
    title = f"Perplexity on {text} against decoding time"
    beside = " Measured beside other work: do not trust it." if results.workers > 1 else ""
    return Figure(
        title,
        pareto(title, dots, "decoding, ms per token", joined=False),
        f"lower and further left is better; marked are the models on the front of size.{beside}",
    )


def _far_line(far: list[tuple[ModelRow, int]], text: str) -> tuple[float, str] | None:
    if not far:
        return None
    model, size = far[0]
    value = model.perplexity[text].value
    return value, f"{model.title}: {perplexity_words(value)} at {bytes_text(size)}"


def _dot(row: SweepRow, model: ModelRow, text: str, x: float, words: str) -> Dot:
    return Dot(
        row.label,
        f"{row.name}: {score_words(model, text)}, {words}",
        x,
        model.perplexity[text].value,
        on_front=text in row.on_front,
        failed=row.gate == "failed",
    )


def _reference_dot(model: ModelRow, text: str, x: float, on_front: bool) -> Dot:
    title = f"{model.title}: {score_words(model, text)}, {bytes_text(model.bytes or 0)}"
    return Dot(model.title, title, x, model.perplexity[text].value, on_front=on_front, reference=True)


def _drawable(model: ModelRow, text: str) -> bool:
    return text in model.perplexity and 0 < model.perplexity[text].value < math.inf
