"""The table of a sweep: for the page, for the terminal, and as CSV."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from camera.report.pareto import SweepResults, SweepRow
from camera.report.schema import ModelRow
from camera.report.table import Grid, grid_markdown
from camera.report.words import accuracy_words, milliseconds, score_words
from camera.units import bytes_text

FRONT = "●"
"""The mark of a model on the front of some text."""


@dataclass(frozen=True)
class Cell:
    """What is shown, and what it is sorted by."""

    shown: str
    key: float | str | None = None
    """None: there is nothing to sort, and it comes last."""


@dataclass(frozen=True)
class Line:
    """One model of the sweep."""

    name: str
    cells: tuple[Cell, ...]
    strong: bool
    """A member on the front of some text."""
    note: str = ""
    """Why it failed, or fails the gate."""


def columns(results: SweepResults) -> tuple[str, ...]:
    """The head of the table: the model, what varies, size, quality, speed, verdicts."""
    return (
        "model",
        *_heads(results),
        "FFN",
        "size",
        "bits/w",
        *(f"ppl {text}" for text in results.texts),
        *(["tasks"] if _has_tasks(results) else []),
        "decode ms",
        *(["gate"] if _has_gate(results) else []),
        "front",
    )


def lines(results: SweepResults) -> list[Line]:
    """The references, then every member in the order of the sweep."""
    marked = {
        model: any(model in found for found in results.references_on_front.values())
        for model in (reference.id for reference in results.references)
    }
    references = [_reference(results, model, marked[model.id]) for model in results.references]
    return references + [_member(results, row) for row in results.rows]


def sweep_table(results: SweepResults) -> Group:
    """The table for a terminal, with a line for each member that failed."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), header_style="bold")
    # A terminal is narrow, and the name of a member says what varies.
    heads, found = columns(results), lines(results)
    shown = [index for index in range(len(heads)) if not 0 < index <= len(results.varied)]
    for index in shown:
        table.add_column(escape(heads[index]), justify="left" if index == 0 else "right", overflow="fold")
    for line in found:
        cells = [escape(line.cells[index].shown) for index in shown]
        table.add_row(*cells, style="bold" if line.strong else None)
    notes = [f"{escape(line.name)}: {escape(line.note)}" for line in found if line.note]
    legend = f"{FRONT}: on the Pareto front, no other model is as small and as good"
    return Group(table, f"[dim]{legend}[/dim]", *notes)


def sweep_markdown(results: SweepResults) -> str:
    """The same table as Markdown."""
    found = lines(results)
    grid = Grid(
        results.name,
        columns(results),
        tuple(tuple(cell.shown for cell in line.cells) for line in found),
        words=1 + len(results.varied),
        strong=tuple(index for index, line in enumerate(found) if line.strong),
        notes=tuple(f"{line.name}: {line.note}" for line in found if line.note),
    )
    return grid_markdown(grid) + "\n"


def csv_rows(results: SweepResults) -> Iterator[list[Any]]:
    """A head and a line for each model; empty cells where nothing was measured."""
    texts = results.texts
    yield [
        *("model", *results.varied, "ffn_width", "removed_share", "parameters", "bytes", "bits_per_weight"),
        *(
            f"{quantity}.{text}"
            for text in texts
            for quantity in ("perplexity", "perplexity_change", "front")
        ),
        *("task_average", "decode_ms", "decode_speedup", "gate", "failure"),
    ]
    for model in results.references:
        on = [text for text, found in results.references_on_front.items() if model.id in found]
        blank = [None] * len(results.varied)
        yield [model.title, *blank, *_facts(model, None), *_scores(model, texts, on), *[None] * 4]
    for row in results.rows:
        yield [
            row.name,
            *(row.varied.get(field) for field in results.varied),
            *_facts(row.model, row.removed_share),
            *_scores(row.model, texts, row.on_front),
            *(row.decode_ms, row.decode_speedup, row.gate, row.failure),
        ]


def _heads(results: SweepResults) -> list[str]:
    """The fields that vary by their last name, or in full where two have the same."""
    last = [field.rpartition(".")[2] for field in results.varied]
    return [
        name if last.count(name) == 1 and name != "model" else field
        for name, field in zip(last, results.varied, strict=True)
    ]


def _has_gate(results: SweepResults) -> bool:
    return any(row.gate is not None for row in results.rows)


def _has_tasks(results: SweepResults) -> bool:
    models = [*results.references, *(row.model for row in results.rows if row.model is not None)]
    return any(model.task_average for model in models)


def _reference(results: SweepResults, model: ModelRow, on_front: bool) -> Line:
    blank = [Cell("")] * len(results.varied)
    gate = [Cell("")] if _has_gate(results) else []
    front = Cell(FRONT, 1) if on_front else Cell("")
    cells = (Cell(model.title, model.title), *blank, *_measured(results, model), Cell("–"), *gate, front)
    return Line(model.title, cells, strong=False)


def _member(results: SweepResults, row: SweepRow) -> Line:
    values = [row.varied.get(field) for field in results.varied]
    varied = [Cell(f"{value}", value if isinstance(value, int | float) else str(value)) for value in values]
    speedup = "" if row.decode_speedup is None else f" ({row.decode_speedup:.2f}×)"
    decode = Cell("–")
    if row.decode_ms is not None:
        decode = Cell(f"{milliseconds(row.decode_ms)}{speedup}{'*' if row.noisy else ''}", row.decode_ms)
    gate = [Cell(row.gate or "–", row.gate or "")] if _has_gate(results) else []
    if row.failure is not None and row.model is None:
        front = Cell("failed")
    else:
        front = Cell(FRONT, 1) if row.on_front else Cell("")
    return Line(
        row.name,
        (Cell(row.label, row.label), *varied, *_measured(results, row.model), decode, *gate, front),
        bool(row.on_front),
        row.failure or "; ".join(row.gate_reasons),
    )


def _measured(results: SweepResults, model: ModelRow | None) -> list[Cell]:
    if model is None:
        return [Cell("–")] * (3 + len(results.texts) + _has_tasks(results))
    average = model.task_average.get("acc")
    width, size, bits = model.ffn_width, model.bytes, model.bits_per_weight
    scores = [
        Cell(score_words(model, text), model.perplexity[text].value if text in model.perplexity else None)
        for text in results.texts
    ]
    return [
        Cell("–" if width is None else str(width), width),
        Cell("–" if size is None else bytes_text(size), size),
        Cell("–" if bits is None else f"{bits:.2f}", bits),
        *scores,
        *(
            [Cell(accuracy_words(average), None if average is None else average.value)]
            if _has_tasks(results)
            else []
        ),
    ]


def _facts(model: ModelRow | None, removed: float | None) -> list[Any]:
    if model is None:
        return [None] * 5
    return [model.ffn_width, removed, model.parameters, model.bytes, model.bits_per_weight]


def _scores(model: ModelRow | None, texts: tuple[str, ...], on_front: Any) -> list[Any]:
    found: list[Any] = []
    for text in texts:
        score = None if model is None else model.perplexity.get(text)
        found += [None, None, None] if score is None else [score.value, score.change, text in on_front]
    average = None if model is None else model.task_average.get("acc")
    return [*found, None if average is None else average.value]
