"""The tables of results: for the page, for the terminal, and as Markdown for the model card."""

from collections import defaultdict
from dataclasses import dataclass
from statistics import fmean

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from camera.benchmark.report import BenchmarkRow
from camera.escape import markdown, one_line
from camera.evaluation.chance import CERTAIN
from camera.report.schema import Accuracy, ModelRow, Results
from camera.report.words import (
    accuracy_words,
    count_words,
    ffn_words,
    score_words,
    speed_words,
    verdict,
)
from camera.units import bytes_text

NOISY = "*: the runs lie further apart than 20 % of their median; measure again on a quiet machine"


@dataclass(frozen=True)
class Grid:
    """What every output draws in its own way."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int
    """How many of the first columns hold words and are set to the left; the others hold numbers."""
    strong: tuple[int, ...] = ()
    """The rows of the model that the run was for."""
    notes: tuple[str, ...] = ()
    sort_keys: tuple[tuple[float | str | None, ...], ...] = ()
    """By what a page sorts each cell of each row, where it sorts at all; None comes last."""


def quality_grid(results: Results) -> Grid:
    """One row for each model: what it is, its size, its perplexity on each text."""
    texts = results.datasets
    ffn = "experts × channels of each" if any(row.experts for row in results.models) else "channels per layer"
    notes = [f"FFN: {ffn}; size: all weights; bits/w: bits per weight, all tensors counted"]
    if texts:
        notes.append("ppl: perplexity, lower is better; in brackets the change against the original")
    return Grid(
        "Size and quality",
        ("model", "type", "FFN", "size", "bits/w", *(f"ppl {text}" for text in texts)),
        tuple(
            (
                row.title,
                row.type or "–",
                ffn_words(row),
                "–" if row.bytes is None else bytes_text(row.bytes),
                "–" if row.bits_per_weight is None else f"{row.bits_per_weight:.2f}",
                *(score_words(row, text) for text in texts),
            )
            for row in results.models
        ),
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
    measured: dict[tuple[str, str], dict[int, BenchmarkRow]] = defaultdict(dict)
    for row in rows:
        measured[row.engine, row.model][row.decode] = row
    sparse = any(row.experts for row in results.models)
    lines = []
    for (engine, model), by_length in measured.items():
        timed = next((row for row in by_length.values() if row.prefill_ms is not None), None)
        prefill = "–" if timed is None else speed_words(timed.prefill_ms, timed.prefill_speedup)
        decode = (
            "–" if row is None else speed_words(row.decode_ms, row.decode_speedup, row.noisy)
            for row in map(by_length.get, lengths)
        )
        longest = by_length[max(by_length)].bytes_per_token
        reads = "–" if longest is None else bytes_text(longest)
        lines.append((model, engine, prefill, *decode, *([reads] if sparse else [])))
    notes = ["ms per token, median; lower is faster"]
    if results.benchmark_baseline is not None:
        notes.append(f"in brackets: time of {results.benchmark_baseline} ÷ this time")
    if any(row.noisy for row in rows):
        notes.append(NOISY)
    for row in rows:
        if row.stand_in is not None:
            notes.append(f"{row.model} on {row.engine}: timed as {row.stand_in}")
    for row in rows:
        if row.failure is not None:
            same = all(each.failure == row.failure for each in measured[row.engine, row.model].values())
            tokens = "" if same else f", {row.decode} tokens"
            notes.append(f"{row.model} on {row.engine}{tokens}: not measured. {row.failure}")
    if sparse:
        notes.append(
            "reads: bytes that a token reads at the longest decode, weights of the experts used alone"
        )
    product = results.product
    return Grid(
        f"Speed on {results.device.name}" if results.device else "Speed",
        (
            "model",
            "engine",
            f"prefill {rows[0].prompt}",
            *(f"decode {length}" for length in lengths),
            *(["reads"] if sparse else []),
        ),
        tuple(lines),
        words=2,
        strong=tuple(
            index for index, (_, model) in enumerate(measured) if product and model == product.title
        ),
        notes=tuple(dict.fromkeys(notes)),
    )


def task_grid(results: Results) -> Grid | None:
    """One row for each text and each task, with differences from the original. None if no task was measured."""
    tasks = results.tasks
    if not tasks:
        return None
    models = [row for row in results.models if row.tasks]
    has_norm = {task for row in models for task, score in row.tasks.items() if "acc_norm" in score.metrics}
    averaged = len(tasks) > 1 and any(row.task_average for row in models)
    chances = {
        task: score.chance for row in models for task, score in row.tasks.items() if score.chance is not None
    }
    blank = ("",) if chances else ()
    rows = [
        (f"perplexity, {text}", *blank, *(score_words(row, text) for row in models))
        for text in results.datasets
    ]
    for name, shown, suffix in (
        ("acc", tasks, ""),
        ("acc_norm", [t for t in tasks if t in has_norm], ", norm"),
    ):
        for task in shown:
            known = (f"{100 * chances[task]:.1f}" if task in chances else "–",) if chances else ()
            rows.append((task + suffix, *known, *(_cell(row, task, name) for row in models)))
        if averaged and shown:
            means = (accuracy_words(row.task_average.get(name)) for row in models)
            mean = f"{100 * fmean(chances.values()):.1f}" if chances.keys() == set(tasks) else ""
            rows.append((f"average{suffix}", *([mean] if chances else []), *means))
    return Grid(
        "Perplexity and accuracy on tasks",
        ("", *(["chance"] if chances else []), *(row.title for row in models)),
        tuple(rows),
        words=1,
        strong=tuple(index for index, row in enumerate(rows) if row[0].startswith("average")),
        notes=_task_notes(results, models, bool(has_norm)),
    )


def _cell(row: ModelRow, task: str, name: str) -> str:
    score = row.tasks[task].metrics.get(name) if task in row.tasks else None
    above = score is not None and score.p_by_chance is not None and score.p_by_chance < CERTAIN
    return accuracy_words(score) + ("*" if _is_certain(score) else "") + (" ↑" if above else "")


def _is_certain(score: Accuracy | None) -> bool:
    change = None if score is None else score.change
    return change is not None and change.p_value is not None and change.p_value < CERTAIN


def _task_notes(results: Results, models: list[ModelRow], normalised: bool) -> tuple[str, ...]:
    first = models[0]
    scores = [score for row in models for score in row.tasks.values()]
    shots = "–".join(map(str, sorted({score.few_shot for score in scores})))
    limited = ", the first ones of each task only" if any(score.limit is not None for score in scores) else ""
    notes = [
        f"accuracy in %, {shots}-shot, by lm-eval; ± one standard error; "
        f"{count_words(sum(score.documents for score in first.tasks.values()))} questions{limited}, layers in "
        f"{' and '.join(sorted({score.dtype for score in scores}))}",
        "in brackets: points more or less than the original on the same questions, ± one standard error of the "
        "difference in pairs",
    ]
    if any(_is_certain(accuracy) for score in scores for accuracy in score.metrics.values()):
        notes.append(f"*: more than chance (exact McNemar test, p < {CERTAIN})")
    if any(score.chance is not None for score in scores):
        notes.append(
            "↑: above chance, which is guessing, or always giving the commonest of the same answers if that is more (exact binomial "
            f"test, one-sided, p < {CERTAIN}); without it an accuracy says nothing of the model"
        )
    if normalised:
        notes.append(
            "norm: the answer of the highest likelihood per character (acc_norm); average, norm: of these where a task has it"
        )
    for label in results.datasets:
        if (text := first.perplexity.get(label)) is not None:
            notes.append(
                f"perplexity, {label}: {count_words(text.tokens)} tokens in windows of {text.window}, layers in {text.dtype}"
            )
    return tuple(notes)


def grids(results: Results) -> list[Grid]:
    """All tables that there is something for."""
    found = (quality_grid(results), task_grid(results), speed_grid(results))
    return [grid for grid in found if grid is not None]


def results_table(results: Results) -> Group:
    """The tables for a terminal; they fit 100 columns with up to two texts and three decode lengths."""
    title = Text.assemble((one_line(results.name), "bold"), f"  {one_line(verdict(results))}")
    parts: list[Table | Text | str] = [title, ""]
    for grid in grids(results):
        parts += [terminal_table(grid), *(Text(one_line(note), "dim") for note in grid.notes), ""]
    return Group(*parts)


def terminal_table(grid: Grid) -> Table:
    """One table for a terminal."""
    table = Table(
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title=Text(one_line(grid.title)),
        title_justify="left",
        header_style="bold",
    )
    for index, column in enumerate(grid.columns):
        table.add_column(
            Text(one_line(column)), justify="left" if index < grid.words else "right", overflow="fold"
        )
    for index, row in enumerate(grid.rows):
        table.add_row(*(Text(one_line(cell)) for cell in row), style="bold" if index in grid.strong else None)
    return table


def results_markdown(results: Results) -> str:
    """The same tables for a model card."""
    return "\n\n".join(grid_markdown(grid) for grid in grids(results)) + "\n"


def grid_markdown(grid: Grid) -> str:
    """One table as Markdown, which leaves the words of its cells as they are."""
    rows = [[markdown(cell) for cell in row] for row in (grid.columns, *grid.rows)]
    for index in grid.strong:
        rows[1 + index][0] = f"**{rows[1 + index][0]}**"
    rows.insert(1, ["---" if index < grid.words else "---:" for index in range(len(grid.columns))])
    lines = [f"**{markdown(grid.title)}**", "", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join([*lines, *([""] if grid.notes else []), *(f"- {markdown(note)}" for note in grid.notes)])
