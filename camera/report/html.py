"""The report: one HTML file that needs nothing beside it, and the same results as JSON and CSV."""

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from camera.benchmark.report import BenchmarkRow
from camera.files import whole_file, write_json
from camera.report import charts
from camera.report.damage_chart import damage_by_layer
from camera.report.heat_map import importance_map
from camera.report.lineage_rows import lineage_rows, made_with
from camera.report.schema import Accuracy, Results
from camera.report.table import grids
from camera.report.words import (
    change_words,
    count_words,
    milliseconds,
    noisy_words,
    percent,
    points_words,
    quoted_row,
    score_words,
    tasks_words,
    verdict,
)
from camera.units import bytes_text

HTML, JSON, CSV = "report.html", "results.json", "results.csv"
_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


@dataclass(frozen=True)
class Figure:
    """A drawing with its heading."""

    title: str
    drawing: Markup
    note: str = ""


def write_report(results: Results, out: Path, lineage: Mapping[str, Any] | None = None) -> None:
    """Write `report.html`, `results.json` and `results.csv` into the folder `out`.

    Args:
        results: what `collect_results` gathered.
        out: an existing folder.
        lineage: the stages and sources that the results descend from.
    """
    write_json(out / JSON, results.model_dump(mode="json"))
    with whole_file(out / CSV) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("model", "quantity", "of", "value"))
        writer.writerows(flat_rows(results))
    with whole_file(out / HTML) as temporary:
        temporary.write_text(render_html(results, lineage), encoding="utf-8")


def render_html(results: Results, lineage: Mapping[str, Any] | None = None) -> str:
    """The page. Equal results give equal bytes."""
    environment = Environment(
        loader=PackageLoader("camera", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, count=count_words, size=bytes_text)
    return environment.get_template("report.html.j2").render(
        results=results,
        verdict=verdict(results),
        tiles=_tiles(results),
        grids=grids(results),
        perplexity_figures=_perplexity_figures(results),
        noisy=noisy_words(results),
        speed_figures=_speed_figures(results),
        importance_figures=_importance_figures(results),
        recipe=yaml.safe_dump(results.recipe, sort_keys=False, allow_unicode=True, width=100),
        lineage=lineage_rows(lineage or {}),
        made_with=made_with(lineage or {}),
    )


def flat_rows(results: Results) -> Iterator[tuple[str, str, str, float | int | str]]:
    """Every number of the tables: model, quantity, of what (text; or engine, prompt and length), value."""
    for row in results.models:
        for quantity in ("type", "ffn_width", "parameters", "bytes", "bits_per_weight"):
            if (value := getattr(row, quantity)) is not None:
                yield row.title, quantity, "", value
        for dataset, score in row.perplexity.items():
            yield row.title, "perplexity", dataset, score.value
            if score.change is not None:
                yield row.title, "perplexity_change", dataset, score.change
        for task, answered in row.tasks.items():
            yield row.title, "documents", task, answered.documents
            yield from _accuracy_rows(row.title, task, answered.metrics)
        yield from _accuracy_rows(row.title, "average", row.task_average)
    if results.gate is not None and results.product is not None:
        yield results.product.title, "gate", "", results.gate.verdict
    for timed in results.benchmark:
        of = f"{timed.engine} prompt={timed.prompt} decode={timed.decode}"
        for quantity in ("prefill_ms", "decode_ms"):
            if (spread := getattr(timed, quantity)) is not None:
                yield timed.model, quantity, of, spread.median
                yield timed.model, f"{quantity}_low", of, spread.low
                yield timed.model, f"{quantity}_high", of, spread.high
        for quantity in ("tokens_per_second", "prefill_speedup", "decode_speedup", "peak_bytes", "failure"):
            if (value := getattr(timed, quantity)) is not None:
                yield timed.model, quantity, of, value


def _accuracy_rows(
    title: str, of: str, metrics: Mapping[str, Accuracy]
) -> Iterator[tuple[str, str, str, float | int | str]]:
    for name, score in metrics.items():
        quantities = {"": score.value, "_standard_error": score.standard_error}
        if score.change is not None:
            quantities |= {
                f"_{field}": getattr(score.change, field)
                for field in ("difference", "gained", "lost", "p_value")
            }
            quantities["_difference_standard_error"] = score.change.standard_error
        for quantity, value in quantities.items():
            if value is not None:
                yield title, name + quantity, of, value


def _tiles(results: Results) -> list[tuple[str, str, str]]:
    """Figures at the head of the page: number, what it is, and what it is compared with."""
    tiles = []
    if results.prune is not None:
        removed = (
            f"{results.prune.width} → {results.prune.mean_width} channels per layer{results.prune.averaged}"
        )
        tiles.append((percent(results.prune.removed_share), "of FFN channels removed", removed))
    product, original = results.product, results.row("original")
    if product and product.bytes and original and original.bytes:
        tiles.append(
            (
                bytes_text(product.bytes),
                "on disk",
                f"{original.bytes / product.bytes:.1f} × smaller than the original",
            )
        )
    for dataset, score in list(product.perplexity.items())[:1] if product else ():
        if score.change is not None:
            tiles.append((change_words(score.change), f"perplexity, {dataset}", "against the original"))
    average = product.task_average.get("acc") if product else None
    if average is not None and average.change is not None:
        tiles.append(
            (
                points_words(average.change.difference),
                f"points, {tasks_words(results)}",
                f"{percent(average.value)} right",
            )
        )
    if (quoted := quoted_row(results)) is not None and quoted.decode_speedup is not None:
        tiles.append(
            (
                f"{quoted.decode_speedup:.2f} ×",
                "decode speed",
                f"of {results.benchmark_baseline}{', noisy' if quoted.noisy else ''}",
            )
        )
    return tiles


def _perplexity_figures(results: Results) -> list[Figure]:
    """Bars of every text, then size against perplexity of every text."""
    found = [_perplexity_bars(results, dataset) for dataset in results.datasets]
    return found + [
        figure
        for dataset in results.datasets
        if (figure := _perplexity_by_size(results, dataset)) is not None
    ]


def _perplexity_bars(results: Results, dataset: str) -> Figure:
    measured = [(row, row.perplexity[dataset]) for row in results.models if dataset in row.perplexity]
    entries = [
        charts.Bar(row.title, score.value, score_words(row, dataset), strong=row == results.product)
        for row, score in measured
    ]
    first = measured[0][1]
    title = f"Perplexity on {dataset}"
    note = f"{count_words(first.tokens)} scored tokens in windows of {first.window}; lower is better"
    return Figure(title, charts.bars(title, entries), note)


def _perplexity_by_size(results: Results, dataset: str) -> Figure | None:
    sized = [
        (row, row.bytes, row.perplexity[dataset].value)
        for row in results.models
        if dataset in row.perplexity and row.bytes is not None
    ]
    if len(sized) < 2:
        return None
    largest = max(size for _, size, _ in sized)
    scale, unit = next(((scale, unit) for scale, unit in _UNITS if largest >= scale), (1.0, "bytes"))
    points = [
        charts.Point(row.title, size / scale, value, row == results.product) for row, size, value in sized
    ]
    title = f"Perplexity on {dataset} against size"
    return Figure(title, charts.scatter(title, points, unit), "lower left is better")


def _speed_figures(results: Results) -> list[Figure]:
    figures = []
    product = results.product
    for engine in dict.fromkeys(row.engine for row in results.benchmark):
        rows = [row for row in results.benchmark if row.engine == engine]
        lengths = sorted({row.decode for row in rows})
        for quantity, length in [("prefill", lengths[0]), *(("decode", length) for length in lengths)]:
            shown = [
                row for row in rows if row.decode == length and getattr(row, f"{quantity}_ms") is not None
            ]
            if not shown:
                continue
            entries = [
                _speed_bar(row, quantity, product is not None and row.model == product.title) for row in shown
            ]
            reference = next(
                (entry.value for entry in entries if entry.label == results.benchmark_baseline), None
            )
            title = (
                f"{engine}: prefill of {rows[0].prompt} tokens"
                if quantity == "prefill"
                else f"{engine}: decode of {length} tokens"
            )
            note = "ms per token; lines from the fastest to the slowest run"
            if reference is not None:
                note += f"; dashed: {results.benchmark_baseline}"
            figures.append(Figure(title, charts.bars(title, entries, reference), note))
    return figures


def _speed_bar(row: BenchmarkRow, quantity: str, strong: bool) -> charts.Bar:
    spread, speedup = getattr(row, f"{quantity}_ms"), getattr(row, f"{quantity}_speedup")
    words = milliseconds(spread.median) + ("" if speedup is None else f" ({speedup:.2f}×)")
    noisy = " *" if row.noisy and quantity == "decode" else ""
    return charts.Bar(row.model, spread.median, words + noisy, strong, spread.low, spread.high)


def _importance_figures(results: Results) -> list[Figure]:
    layers, prune = results.importance, results.prune
    if not layers:
        return []
    figures = [
        Figure(
            "Importance of micro-experts",
            charts.importance_curves(layers, prune),
            f"one line per decoder layer, faint for layer 0 to strong for layer {len(layers) - 1}; log scale",
        )
    ]
    figures.append(
        Figure(
            "Importance by layer and rank",
            importance_map(layers, prune),
            "a row is a decoder layer, its micro-experts sorted; one log scale for all layers, strong is important",
        )
    )
    if all(layer.kept_importance is not None for layer in layers):
        figures.append(
            Figure(
                "Importance that the kept channels hold",
                charts.kept_importance(layers, prune),
                "the further above the dashed line, the less pruning took",
            )
        )
    if results.damage:
        steps = max(layer.step for layer in results.damage)
        figures.append(
            Figure(
                "Damage by layer",
                damage_by_layer(results.damage),
                "share of the FFN output's energy lost, on calibration tokens held back; strong: as it was cut, "
                "faint: as plain CAMERA cuts it" + (f"; the last of {steps} steps" if steps > 1 else ""),
            )
        )
    if prune is not None and all(layer.kept_bins for layer in layers):
        bins = len(layers[0].kept_bins)
        each = (
            "a column is one channel"
            if bins == prune.width
            else f"a column is about {prune.width / bins:.0f} channels"
        )
        figures.append(
            Figure(
                "Channels kept",
                charts.kept_map(layers, prune.width),
                f"a row is a decoder layer, {each}; strong stays, faint goes",
            )
        )
    return figures
