"""The report of a sweep: one HTML file that needs nothing beside it, tables, and the same results as JSON and CSV."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.text import Text

from camera.escape import one_line
from camera.files import write_json
from camera.report.charts import Dot, scatter
from camera.report.html import write_csv, write_text
from camera.report.schema import ModelRow
from camera.report.sweep import SweepResults, SweepRow, summary
from camera.report.table import NOISY, Grid, grid_markdown, terminal_table
from camera.report.templates import render
from camera.report.words import (
    accuracy_words,
    drawable,
    ffn_words,
    milliseconds,
    perplexity_words,
    score_words,
    size_unit,
)
from camera.units import bytes_text

HTML, JSON, CSV = "sweep.html", "sweep.json", "sweep.csv"
FRONT = "●"
"""The mark of a model on the front of some text."""
_FAR = 1.6
"""An original so many times as large as the largest member is a line, not a dot: the members would be one spot."""


def write_sweep(results: SweepResults, out: Path) -> None:
    """Write `sweep.html`, `sweep.json` and `sweep.csv` into an existing folder."""
    write_json(out / JSON, results.model_dump(mode="json"))
    write_csv(out / CSV, csv_rows(results))
    write_text(out / HTML, render_sweep(results))


def render_sweep(results: SweepResults) -> str:
    """The page. Equal results give equal bytes."""
    return render(
        "sweep.html.j2",
        results=results,
        summary=summary(results),
        grid=sweep_grid(results),
        by_size=[drawn for text in results.texts for drawn in _by_size(results, text)],
        by_time=[drawn for text in results.texts for drawn in _by_time(results, text)],
        noisy=NOISY if any(row.noisy for row in results.rows) else "",
    )


def sweep_table(results: SweepResults) -> Group:
    """The table for a terminal, with a line for each member that failed."""
    legend = f"{FRONT}: on the Pareto front, no other model is as small and as good"
    # A terminal is narrow, and the name of a member says what varies.
    grid = sweep_grid(results, with_varied=False)
    return Group(terminal_table(grid), Text(legend, "dim"), *(Text(one_line(note)) for note in grid.notes))


def sweep_markdown(results: SweepResults) -> str:
    """The same table as Markdown."""
    return grid_markdown(sweep_grid(results)) + "\n"


def sweep_grid(results: SweepResults, *, with_varied: bool = True) -> Grid:
    """The references, then every member in the order of the sweep: what varies, size, quality, speed, verdicts."""
    rows = [*results.reference_rows, *results.rows]
    varied = results.varied if with_varied else ()
    columns = ("model", *(_head(field, results.varied) for field in varied), "FFN", "size", "bits/w")
    columns += (*(f"ppl {text}" for text in results.texts), "tasks", "decode ms", "gate", "front")
    cells = [_cells(row, varied, results.texts) for row in rows]
    has_tasks = any(row.model is not None and row.model.task_average for row in rows)
    has_gate = any(row.gate is not None for row in rows)
    last = len(columns)
    hidden = {index for index, has in ((last - 4, has_tasks), (last - 2, has_gate)) if not has}
    shown = [index for index in range(last) if index not in hidden]
    return Grid(
        results.name if with_varied else "",
        tuple(columns[index] for index in shown),
        tuple(tuple(line[index][0] for index in shown) for line in cells),
        words=1 + len(varied),
        strong=tuple(index for index, row in enumerate(rows) if row.varied and row.on_front),
        notes=tuple(
            f"{row.name}: {row.failure or '; '.join(row.gate_reasons)}"
            for row in rows
            if row.failure or row.gate_reasons
        ),
        sort_keys=tuple(tuple(line[index][1] for index in shown) for line in cells),
    )


def csv_rows(results: SweepResults) -> Iterator[list[Any]]:
    """A head and a line for each model; empty cells where nothing was measured."""
    of_texts = ("perplexity", "perplexity_change", "front")
    yield [
        *("model", *results.varied, "ffn_width", "removed_share", "parameters", "bytes", "bits_per_weight"),
        *(f"{quantity}.{text}" for text in results.texts for quantity in of_texts),
        *("task_average", "decode_ms", "decode_speedup", "gate", "failure"),
    ]
    for row in [*results.reference_rows, *results.rows]:
        model = row.model
        scores: list[Any] = []
        for text in results.texts:
            score = None if model is None else model.perplexity.get(text)
            scores += [None] * 3 if score is None else [score.value, score.change, text in row.on_front]
        yield [
            *(row.name, *(row.varied.get(field) for field in results.varied)),
            *(None if model is None else model.ffn_width, row.removed_share),
            *([None] * 3 if model is None else [model.parameters, model.bytes, model.bits_per_weight]),
            *(*scores, None if model is None else _task_average(model)),
            *(row.decode_ms, row.decode_speedup, row.gate, row.failure),
        ]


def _head(field: str, varied: tuple[str, ...]) -> str:
    """A field that varies by its last name, or in full where two have the same."""
    last = [other.rpartition(".")[2] for other in varied]
    name = field.rpartition(".")[2]
    return name if last.count(name) == 1 and name != "model" else field


def _cells(row: SweepRow, varied: tuple[str, ...], texts: tuple[str, ...]) -> list[tuple[str, Any]]:
    """What is shown in each column, and what it is sorted by."""
    model = row.model

    def measured(key: Any, words: str) -> tuple[str, Any]:
        return ("–", None) if key is None else (words, key)

    values = [row.varied.get(field, "") for field in varied]
    cells: list[tuple[str, Any]] = [(row.label, row.label)]
    cells += [
        (str(value), value if isinstance(value, int | float) else str(value) or None) for value in values
    ]
    if model is None:
        cells += [("–", None)] * (4 + len(texts))
    else:
        scores = {text: score.value for text, score in model.perplexity.items()}
        cells += [
            measured(model.ffn_width, ffn_words(model)),
            measured(model.bytes, bytes_text(model.bytes or 0)),
            measured(model.bits_per_weight, f"{model.bits_per_weight or 0:.2f}"),
            *(measured(scores.get(text), score_words(model, text)) for text in texts),
            measured(_task_average(model), accuracy_words(model.task_average.get("acc"))),
        ]
    speedup = "" if row.decode_speedup is None else f" ({row.decode_speedup:.2f}×)"
    shown = f"{milliseconds(row.decode_ms or 0)}{speedup}{'*' if row.noisy else ''}"
    cells += [
        measured(row.decode_ms, shown),
        measured(row.gate, row.gate or "") if row.varied else ("", None),
    ]
    if row.failure is not None and model is None:
        return [*cells, ("failed", None)]
    return [*cells, (FRONT, 1) if row.on_front else ("", None)]


def _task_average(model: ModelRow) -> float | None:
    average = model.task_average.get("acc")
    return None if average is None else average.value


def _by_size(results: SweepResults, text: str) -> Iterator[tuple[str, str]]:
    """Title and drawing, if there is a member to draw."""
    members = _measured(results.rows, text)
    if not members:
        return
    largest = max(size for _, _, size in members)
    scale, unit = size_unit(largest)
    level = None
    dots = []
    for row, model, size in [*_measured(results.reference_rows, text), *members]:
        value = model.perplexity[text].value
        if size <= _FAR * largest:
            dots.append(_dot(row, model, text, size / scale, bytes_text(size)))
        elif level is None:
            level = value, f"{model.title}: {perplexity_words(value)} at {bytes_text(size)}"
    title = f"Perplexity on {text} against size"
    yield title, scatter(title, dots, f"size, {unit}", level, front=True)


def _by_time(results: SweepResults, text: str) -> Iterator[tuple[str, str]]:
    """Title and drawing, if there are two members to compare."""
    dots = [
        _dot(row, model, text, row.decode_ms, f"{milliseconds(row.decode_ms)} ms per token")
        for row, model, _ in _measured(results.rows, text)
        if row.decode_ms
    ]
    title = f"Perplexity on {text} against decoding time"
    if len(dots) > 1:
        yield title, scatter(title, dots, "decoding, ms per token")


def _measured(rows: tuple[SweepRow, ...], text: str) -> list[tuple[SweepRow, ModelRow, int]]:
    """The rows with perplexity and size, their models and their sizes."""
    return [
        (row, row.model, row.model.bytes)
        for row in rows
        if row.model is not None and row.model.bytes and drawable(row.model, text)
    ]


def _dot(row: SweepRow, model: ModelRow, text: str, x: float, words: str) -> Dot:
    return Dot(
        row.label,
        f"{row.name}: {score_words(model, text)}, {words}",
        x,
        model.perplexity[text].value,
        strong=text in row.on_front,
        square=not row.varied,
        hollow=row.gate == "failed",
    )
