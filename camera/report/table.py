"""The results table: for the terminal, and as Markdown for the model card."""

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from camera.report.grid import Grid
from camera.report.schema import ModelRow, Results
from camera.report.task_table import task_grid
from camera.report.words import (
    score_words,
    speed_words,
    verdict,
)
from camera.units import bytes_text


def quality_grid(results: Results) -> Grid:
    """One row for each model: what it is, its size, its perplexity on each text."""
    texts = results.datasets
    notes = ["FFN: channels per layer; size: all weights; bits/w: bits per weight, all tensors counted"]
    if texts:
        notes.append("ppl: perplexity, lower is better; in brackets the change against the original")
    return Grid(
        "Size and quality",
        ("model", "type", "FFN", "size", "bits/w", *(f"ppl {text}" for text in texts)),
        tuple(_quality_row(row, texts) for row in results.models),
        words=2,
        strong=tuple(index for index, row in enumerate(results.models) if row == results.product),
        notes=(*notes, *(f"not in this run: {part}" for part in results.missing)),
    )


def speed_grid(results: Results) -> Grid | None:
    """One row for each model and engine: prefill, and decode at each length. None if nothing was timed."""
    rows = results.benchmark
    if not rows:
        return None
    lengths = sorted({row.decode for row in rows})
    keys = list(dict.fromkeys((row.engine, row.model) for row in rows))
    notes = [
        "ms per token, median; lower is faster",
        *(
            []
            if results.benchmark_baseline is None
            else [f"in brackets: time of {results.benchmark_baseline} ÷ this time"]
        ),
    ]
    if any(row.noisy for row in rows):
        notes.append(
            "*: the runs lie further apart than 20 % of their median; measure again on a quiet machine"
        )
    notes += dict.fromkeys(
        f"{row.model} on {row.engine}: timed as {row.stand_in}, which the engine can read"
        for row in rows
        if row.stand_in is not None
    )
    notes += dict.fromkeys(
        f"{row.model} on {row.engine}, {row.decode} tokens: not measured. {row.failure}"
        for row in rows
        if row.failure is not None
    )
    lines = []
    for engine, model in keys:
        mine = {row.decode: row for row in rows if (row.engine, row.model) == (engine, model)}
        timed = next((row for row in mine.values() if row.prefill_ms is not None), None)
        prefill = "–" if timed is None else speed_words(timed.prefill_ms, timed.prefill_speedup)
        decode = (
            speed_words(mine[length].decode_ms, mine[length].decode_speedup, mine[length].noisy)
            if length in mine
            else "–"
            for length in lengths
        )
        lines.append((model, engine, prefill, *decode))
    product = results.product
    return Grid(
        f"Speed on {results.device.name}" if results.device else "Speed",
        ("model", "engine", f"prefill {rows[0].prompt}", *(f"decode {length}" for length in lengths)),
        tuple(lines),
        words=2,
        strong=tuple(index for index, (_, model) in enumerate(keys) if product and model == product.title),
        notes=tuple(notes),
    )


def grids(results: Results) -> list[Grid]:
    """All tables that there is something for."""
    found = (quality_grid(results), task_grid(results), speed_grid(results))
    return [grid for grid in found if grid is not None]


def results_table(results: Results) -> Group:
    """The tables for a terminal; they fit 100 columns with up to two texts and three decode lengths."""
    parts: list[Table | str] = [f"[bold]{escape(results.name)}[/bold]  {escape(verdict(results))}", ""]
    for grid in grids(results):
        table = Table(
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            title=escape(grid.title),
            title_justify="left",
            header_style="bold",
        )
        for index, column in enumerate(grid.columns):
            table.add_column(
                escape(column), justify="left" if index < grid.words else "right", overflow="fold"
            )
        for index, row in enumerate(grid.rows):
            table.add_row(*(escape(cell) for cell in row), style="bold" if index in grid.strong else None)
        parts += [table, *(f"[dim]{escape(note)}[/dim]" for note in grid.notes), ""]
    return Group(*parts)


def results_markdown(results: Results) -> str:
    """The same tables for a model card."""
    return "\n\n".join(grid_markdown(grid) for grid in grids(results)) + "\n"


def _quality_row(row: ModelRow, texts: tuple[str, ...]) -> tuple[str, ...]:
    return (
        row.title,
        row.type or "–",
        "–" if row.ffn_width is None else str(row.ffn_width),
        "–" if row.bytes is None else bytes_text(row.bytes),
        "–" if row.bits_per_weight is None else f"{row.bits_per_weight:.2f}",
        *(score_words(row, text) for text in texts),
    )


def grid_markdown(grid: Grid) -> str:
    """One table as Markdown, which leaves the words of its cells as they are."""
    lines = [
        f"**{_plain(grid.title)}**",
        "",
        _line(grid.columns),
        _line(["---" if index < grid.words else "---:" for index in range(len(grid.columns))]),
    ]
    for index, row in enumerate(grid.rows):
        cells = [_plain(cell) for cell in row]
        lines.append(_line([f"**{cells[0]}**", *cells[1:]] if index in grid.strong else cells))
    if grid.notes:
        lines += ["", *(f"- {_plain(note)}" for note in grid.notes)]
    return "\n".join(lines)


def _line(cells: tuple[str, ...] | list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _plain(text: str) -> str:
    """Text that Markdown leaves as it is."""
    for sign in "\\`*_|<>[]#":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())
