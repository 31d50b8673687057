"""The report of a sweep: one HTML file that needs nothing beside it, tables, and the same results as JSON and CSV."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Group
from rich.markup import escape

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
    return Group(terminal_table(grid), f"[dim]{legend}[/dim]", *map(escape, grid.notes))


def sweep_markdown(results: SweepResults) -> str:
    """The same table as Markdown."""
    return grid_markdown(sweep_grid(results)) + "\n"


class Cell(NamedTuple):
    """What is shown, and what it is sorted by."""

    shown: str
    key: float | str | None = None


def sweep_grid(results: SweepResults, *, with_varied: bool = True) -> Grid:
    """The references, then every member in the order of the sweep: what varies, size, quality, speed, verdicts."""
    rows = [*results.reference_rows, *results.rows]
    varied = results.varied if with_varied else ()
    columns: list[tuple[str, Callable[[SweepRow], Cell]]] = [
        ("model", lambda row: Cell(row.label, row.label))
    ]
    columns += [(_head(field, results.varied), _varied_cell(field)) for field in varied]
    columns += [
        ("FFN", _model_cell(lambda model: model.ffn_width, lambda model: str(model.ffn_width))),
        ("size", _model_cell(lambda model: model.bytes, lambda model: bytes_text(model.bytes or 0))),
        (
            "bits/w",
            _model_cell(lambda model: model.bits_per_weight, lambda model: f"{model.bits_per_weight:.2f}"),
        ),
        *((f"ppl {text}", _score_cell(text)) for text in results.texts),
    ]
    if any(row.model is not None and row.model.task_average for row in rows):
        columns.append(
            ("tasks", _model_cell(_task_average, lambda model: accuracy_words(model.task_average.get("acc"))))
        )
    columns.append(("decode ms", _decode_cell))
    if any(row.gate is not None for row in rows):
        columns.append(
            (
                "gate",
                lambda row: Cell(row.gate or ("–" if row.varied else ""), row.gate if row.varied else None),
            )
        )
    columns.append(("front", _front_cell))
    cells = [[cell(row) for _, cell in columns] for row in rows]
    return Grid(
        results.name if with_varied else "",
        tuple(head for head, _ in columns),
        tuple(tuple(cell.shown for cell in line) for line in cells),
        words=1 + len(varied),
        strong=tuple(index for index, row in enumerate(rows) if row.varied and row.on_front),
        notes=tuple(
            f"{row.name}: {row.failure or '; '.join(row.gate_reasons)}"
            for row in rows
            if row.failure or row.gate_reasons
        ),
        sort_keys=tuple(tuple(cell.key for cell in line) for line in cells),
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


def _varied_cell(field: str) -> Callable[[SweepRow], Cell]:
    def cell(row: SweepRow) -> Cell:
        if not row.varied:
            return Cell("")
        value = row.varied.get(field)
        return Cell(str(value), value if isinstance(value, int | float) else str(value))

    return cell


def _model_cell(
    value: Callable[[ModelRow], float | None], shown: Callable[[ModelRow], str]
) -> Callable[[SweepRow], Cell]:
    def cell(row: SweepRow) -> Cell:
        key = None if row.model is None else value(row.model)
        return Cell("–" if row.model is None or key is None else shown(row.model), key)

    return cell


def _score_cell(text: str) -> Callable[[SweepRow], Cell]:
    return _model_cell(
        lambda model: model.perplexity[text].value if text in model.perplexity else None,
        lambda model: score_words(model, text),
    )


def _task_average(model: ModelRow) -> float | None:
    average = model.task_average.get("acc")
    return None if average is None else average.value


def _decode_cell(row: SweepRow) -> Cell:
    if row.decode_ms is None:
        return Cell("–")
    speedup = "" if row.decode_speedup is None else f" ({row.decode_speedup:.2f}×)"
    return Cell(f"{milliseconds(row.decode_ms)}{speedup}{'*' if row.noisy else ''}", row.decode_ms)


def _front_cell(row: SweepRow) -> Cell:
    if row.failure is not None and row.model is None:
        return Cell("failed")
    return Cell(FRONT, 1) if row.on_front else Cell("")


def _by_size(results: SweepResults, text: str) -> Iterator[tuple[str, str]]:
    """Title and drawing, if there is a member to draw."""
    members = _measured(results.rows, text)
    if not members:
        return
    largest = max(model.bytes or 0 for _, model in members)
    references = _measured(results.reference_rows, text)
    near = [(row, model) for row, model in references if (model.bytes or 0) <= _FAR * largest]
    far = [
        (value, f"{model.title}: {perplexity_words(value)} at {bytes_text(model.bytes or 0)}")
        for row, model in references
        if (row, model) not in near and (value := model.perplexity[text].value)
    ]
    scale, unit = size_unit(largest)
    dots = [
        _dot(row, model, text, (model.bytes or 0) / scale, bytes_text(model.bytes or 0))
        for row, model in near + members
    ]
    title = f"Perplexity on {text} against size"
    yield title, scatter(title, dots, f"size, {unit}", far[0] if far else None, front=True)


def _by_time(results: SweepResults, text: str) -> Iterator[tuple[str, str]]:
    """Title and drawing, if there are two members to compare."""
    dots = [
        _dot(row, model, text, row.decode_ms, f"{milliseconds(row.decode_ms)} ms per token")
        for row, model in _measured(results.rows, text)
        if row.decode_ms
    ]
    title = f"Perplexity on {text} against decoding time"
    if len(dots) > 1:
        yield title, scatter(title, dots, "decoding, ms per token")


def _measured(rows: tuple[SweepRow, ...], text: str) -> list[tuple[SweepRow, ModelRow]]:
    """The rows with size and perplexity."""
    return [
        (row, row.model)
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
