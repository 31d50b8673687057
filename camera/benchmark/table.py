"""A benchmark's rows as the table that people compare: Markdown, aligned, fit for a terminal and for a report."""

from camera.benchmark.report import BenchmarkReport, BenchmarkRow, Spread
from camera.escape import one_line

_TITLES = (
    "engine",
    "model",
    "decode",
    "prefill ms/token",
    "decode ms/token",
    "tokens/s",
    "decode vs baseline",
    "prefill vs baseline",
    "model MiB",
    "peak MiB",
    "bandwidth",
)


def markdown_table(report: BenchmarkReport) -> str:
    """One line for each row; failures below it, with their reasons."""
    measured = [_cells(row) for row in report.rows if row.failure is None]
    lines = _align([_TITLES, *measured]) if measured else []
    notes = [
        f"- {row.engine}, {one_line(row.model)}, {row.decode} tokens: not measured. {one_line(row.failure)}"
        for row in report.rows
        if row.failure is not None
    ]
    if any(row.stand_in for row in report.rows):
        notes.append(
            "- `its Q4_0 twin`: this llama.cpp does not read Q4_0_64 or cannot be asked, so the same numbers were timed as "
            "Q4_0, in 4.5 bits per weight for 4.25."
        )
    if any(row.noisy for row in report.rows):
        notes.append(
            "- `*`: the runs lie further apart than 20 % of their median; measure again on a quiet machine."
        )
    return "\n".join([*lines, *([""] if lines and notes else []), *notes])


def _cells(row: BenchmarkRow) -> tuple[str, ...]:
    return (
        row.engine,
        one_line(f"{row.model}{'' if row.stand_in is None else f' ({row.stand_in})'}").replace("|", "\\|"),
        str(row.decode),
        _spread(row.prefill_ms),
        _spread(row.decode_ms) + (" *" if row.noisy else ""),
        _number(row.tokens_per_second, ".1f"),
        _number(row.decode_speedup, ".2f", "×"),
        _number(row.prefill_speedup, ".2f", "×"),
        _mebibytes(row.model_bytes),
        _mebibytes(row.peak_bytes),
        _number(row.bandwidth_share, ".0%"),
    )


def _spread(spread: Spread | None) -> str:
    return "" if spread is None else f"{spread.median:.3f} ({spread.low:.3f}–{spread.high:.3f})"


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def _mebibytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.1f}"


def _align(table: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in table
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]
