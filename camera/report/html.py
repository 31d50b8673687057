"""The report: one HTML file that needs nothing beside it, and the same results as JSON and CSV."""

import csv
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from camera.benchmark.report import BenchmarkRow
from camera.escape import one_line
from camera.files import atomic_file, write_json
from camera.report import charts, maps, words
from camera.report.lineage import lineage_grid, made_with
from camera.report.schema import Accuracy, Quantization, Results
from camera.report.table import Grid, grids
from camera.report.templates import render
from camera.units import bytes_text

_FORMULA = re.compile(r"[=@]|[+-](?![\d.]+%?$)")
HTML, JSON, CSV = "report.html", "results.json", "results.csv"


@dataclass(frozen=True)
class Bar:
    """One horizontal bar."""

    label: str
    value: float
    words: str
    strong: bool = False
    """The model that the run was for."""
    low: float | None = None
    high: float | None = None
    """The fastest and the slowest run, where there were several."""

    @property
    def end(self) -> float:
        """Where words have room behind it."""
        return self.value if self.high is None else max(self.value, self.high)


@dataclass(frozen=True)
class Bars:
    """A chart of horizontal bars from zero."""

    title: str
    note: str
    bars: tuple[Bar, ...]
    reference: float | None = None
    """A value that a dashed line marks."""

    def place(self, value: float) -> str:
        """A value as a share of the width."""
        largest = max([bar.end for bar in self.bars] + [self.reference or 0.0]) or 1.0
        return f"{100 * value / largest:.4g}%"


def write_report(results: Results, out: Path, lineage: Mapping[str, Any] | None = None) -> None:
    """Write `report.html`, `results.json` and `results.csv` into the folder `out`.

    Args:
        results: what `collect_results` gathered.
        out: an existing folder.
        lineage: the stages and sources that the results descend from.
    """
    write_json(out / JSON, results.model_dump(mode="json"))
    write_csv(out / CSV, [("model", "quantity", "of", "value"), *flat_rows(results)])
    write_text(out / HTML, render_html(results, lineage))


def write_csv(path: Path, rows: Iterable[Iterable[Any]]) -> None:
    """Write a CSV file, the first of the rows being its head."""
    with atomic_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(map(_harmless, rows))


def _harmless(row: Iterable[Any]) -> list[Any]:
    """Cells of which no spreadsheet makes a formula: one that begins like it is told that it is text."""
    cells = [one_line(cell) if isinstance(cell, str) else cell for cell in row]
    return [f"'{cell}" if isinstance(cell, str) and _FORMULA.match(cell) else cell for cell in cells]


def write_text(path: Path, text: str) -> None:
    """Write a text file."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def render_html(results: Results, lineage: Mapping[str, Any] | None = None) -> str:
    """The page. Equal results give equal bytes."""
    return render(
        "report.html.j2",
        results=results,
        words=words,
        charts=charts,
        maps=maps,
        grids=grids(results),
        perplexity_bars=[_perplexity_bars(results, dataset) for dataset in results.datasets],
        perplexity_by_size=list(_perplexity_by_size(results)),
        speed_bars=list(_speed_bars(results)),
        importance_grid=_importance_grid(results),
        few_tokens_grid=_few_tokens_grid(results),
        split_bars=list(_split_bars(results)),
        quantization_grids=[(entry, *_quantization_grids(results, entry)) for entry in results.quantization],
        recipe=yaml.safe_dump(results.recipe, sort_keys=False, allow_unicode=True, width=100),
        lineage_grid=lineage_grid(lineage or {}),
        made_with=made_with(lineage or {}),
    )


def flat_rows(results: Results) -> Iterator[tuple[str, str, str, float | int | str]]:
    """Every number of the tables: model, quantity, of what (text; or engine, prompt and length), value."""
    for title, of, quantities in _quantities(results):
        for quantity, value in quantities.items():
            if value is not None:
                yield title, quantity, of, value


def _quantities(results: Results) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for row in results.models:
        yield (
            row.title,
            "",
            row.model_dump(
                include={"type", "experts", "ffn_width", "parameters", "bytes", "bits_per_weight"}
            ),
        )
        for dataset, score in row.perplexity.items():
            yield row.title, dataset, {"perplexity": score.value, "perplexity_change": score.change}
        for task, answered in row.tasks.items():
            yield row.title, task, {"documents": answered.documents, **_accuracies(answered.metrics)}
        yield row.title, "average", _accuracies(row.task_average)
    if results.gate is not None and results.product is not None:
        yield results.product.title, "", {"gate": results.gate.verdict}
    for timed in results.benchmark:
        found: dict[str, Any] = {}
        for quantity in ("prefill_ms", "decode_ms"):
            if (spread := getattr(timed, quantity)) is not None:
                found |= {
                    quantity: spread.median,
                    f"{quantity}_low": spread.low,
                    f"{quantity}_high": spread.high,
                }
        for quantity in ("tokens_per_second", "prefill_speedup", "decode_speedup", "peak_bytes", "failure"):
            found[quantity] = getattr(timed, quantity)
        yield timed.model, f"{timed.engine} prompt={timed.prompt} decode={timed.decode}", found


def _accuracies(metrics: Mapping[str, Accuracy]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, score in metrics.items():
        found |= {name: score.value, f"{name}_standard_error": score.standard_error}
        if (change := score.change) is not None:
            for field in ("difference", "gained", "lost", "p_value"):
                found[f"{name}_{field}"] = getattr(change, field)
            found[f"{name}_difference_standard_error"] = change.standard_error
    return found


def _perplexity_bars(results: Results, dataset: str) -> Bars:
    measured = [(row, row.perplexity[dataset]) for row in results.models if dataset in row.perplexity]
    bars = (
        Bar(row.title, score.value, words.score_words(row, dataset), row == results.product)
        for row, score in measured
    )
    first = measured[0][1]
    note = f"{words.count_words(first.tokens)} scored tokens in windows of {first.window}; lower is better"
    return Bars(f"Perplexity on {dataset}", note, tuple(bars))


def _perplexity_by_size(results: Results) -> Iterator[tuple[str, str]]:
    """Title and drawing for every text on which two models or more were measured whose size is known."""
    for text in results.datasets:
        models = [row for row in results.models if row.bytes is not None and words.drawable(row, text)]
        scale, unit = words.size_unit(max((row.bytes or 0 for row in models), default=1))
        title = f"Perplexity on {text} against size"
        dots = [
            charts.Dot(
                row.title,
                f"{row.title}: {words.score_words(row, text)}, {bytes_text(row.bytes or 0)}",
                (row.bytes or 0) / scale,
                row.perplexity[text].value,
                strong=row == results.product,
            )
            for row in models
        ]
        if len(dots) > 1:
            yield title, charts.scatter(title, dots, f"size, {unit}")


def _speed_bars(results: Results) -> Iterator[Bars]:
    """Of every engine: prefill, then decode at every length."""
    product = None if results.product is None else results.product.title
    baseline = results.benchmark_baseline
    for engine in dict.fromkeys(row.engine for row in results.benchmark):
        rows = [row for row in results.benchmark if row.engine == engine]
        lengths = sorted({row.decode for row in rows})
        for quantity, length in [("prefill", lengths[0]), *(("decode", length) for length in lengths)]:
            bars = [
                bar
                for row in rows
                if row.decode == length
                and (bar := _speed_bar(row, quantity, strong=row.model == product)) is not None
            ]
            if not bars:
                continue
            reference = next((bar.value for bar in bars if bar.label == baseline), None)
            title = f"{engine}: {quantity} of {rows[0].prompt if quantity == 'prefill' else length} tokens"
            note = "ms per token; lines from the fastest to the slowest run"
            if reference is not None:
                note += f"; dashed: {baseline}"
            yield Bars(title, note, tuple(bars), reference)


def _speed_bar(row: BenchmarkRow, quantity: str, *, strong: bool) -> Bar | None:
    spread, speedup = getattr(row, f"{quantity}_ms"), getattr(row, f"{quantity}_speedup")
    if spread is None:
        return None
    shown = words.speed_words(spread, speedup, row.noisy and quantity == "decode")
    return Bar(row.model, spread.median, shown, strong, spread.low, spread.high)


def _split_bars(results: Results) -> Iterator[Bars]:
    """What `experts: auto` chose from."""
    if results.prune is None or not results.prune.considered:
        return
    bars = tuple(
        Bar(f"{split.experts_kept} × {split.kept}", split.loss, f"{split.loss:.4f}", strong=number == 0)
        for number, split in enumerate(results.prune.considered)
    )
    note = (
        "experts × channels of each that keep to the budget; estimated loss: share of the residual stream's energy "
        "that goes missing, summed over layers; bold: chosen"
    )
    yield Bars("Fewer experts or narrower ones", note, bars)


def _few_tokens_grid(results: Results) -> Grid:
    """The networks whose channels were ranked by their weights."""
    rows = tuple(
        (
            str(layer.layer),
            ", ".join(f"{label} ({tokens})" for label, tokens in layer.ranked_by_weights.items()),
        )
        for layer in results.experts
        if layer.ranked_by_weights
    )
    return Grid("Experts with too few tokens", ("layer", "networks (tokens)"), rows, words=2)


def _importance_grid(results: Results) -> Grid:
    columns = ("layer", "minimum", "1st quartile", "median", "3rd quartile", "maximum", "importance kept")
    rows = [
        (
            str(layer.layer),
            *(f"{value:.3g}" for value in layer.quartiles),
            "–" if layer.kept_importance is None else words.percent(layer.kept_importance, 2),
        )
        for layer in results.importance
    ]
    return Grid("", columns, tuple(rows), words=1)


def _quantization_grids(results: Results, quantization: Quantization) -> tuple[Grid, Grid]:
    """The types of the tensors, and the tensors that fell back to another."""
    row = results.row(quantization.model)
    types = tuple(
        (total.type, str(total.tensors), words.count_words(total.parameters), bytes_text(total.bytes))
        for total in quantization.types
    )
    fall_backs = tuple((entry.tensor, entry.stored, entry.reason) for entry in quantization.fall_backs)
    tensors = f"{len(fall_backs)} tensor{'' if len(fall_backs) == 1 else 's'}"
    title = quantization.model if row is None else row.title
    return (
        Grid(title, ("type", "tensors", "parameters", "size"), types, words=1),
        Grid(tensors, ("tensor", "stored as", "because"), fall_backs, words=3),
    )
