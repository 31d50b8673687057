"""From cells to the table and its goals: means and spreads over seeds, paired differences, shares of the loss recovered."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, sqrt
from statistics import fmean, stdev
from typing import Any

from quality_methods import BASELINE, METHODS
from quality_subjects import OTHER, OWN, Subject
from rich.box import MARKDOWN, SIMPLE_HEAD
from rich.table import Table

CORPORA = (OWN, OTHER)
_LEAST_LOSS = 0.005
"""Nats per token: where CAMERA-P loses less, a share of its loss says nothing."""


@dataclass(frozen=True)
class Value:
    """A mean over calibration seeds, and the sample standard deviation; of one seed there is none."""

    mean: float
    spread: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Value":
        """Of at least one number."""
        return cls(fmean(values), stdev(values) if len(values) > 1 else None)


@dataclass(frozen=True)
class Accuracy:
    """Right answers of one task, averaged over seeds; errors are standard errors over items."""

    share: float
    error: float
    against_baseline: float
    """Difference from CAMERA-P on the same items."""
    against_error: float

    @property
    def worse(self) -> bool:
        """Whether it is below CAMERA-P by more than two standard errors of the paired difference."""
        return self.against_baseline < -2 * self.against_error


@dataclass(frozen=True)
class Row:
    """One method at one ratio on one model."""

    model: str
    ratio: float
    method: str
    width: int
    seeds: int
    perplexity: dict[str, Value]
    loss: dict[str, Value]
    """By corpus: ln perplexity above the dense model's."""
    divergence: dict[str, Value]
    recovered: dict[str, Value | None]
    """By corpus: share of CAMERA-P's loss that is not lost; None where that is too small to share out."""
    tasks: dict[str, Accuracy]


def rows_of(model: str, dense: dict[str, Any], cells: list[dict[str, Any]]) -> list[Row]:
    """The rows of one model, by ratio and method.

    Args:
        model: its name.
        dense: what was measured for the dense model.
        cells: what was measured for each method, ratio and seed. Seeds count for which there is CAMERA-P too, and tasks
            that all of a row's cells have.
    """
    rows = []
    for ratio in sorted({cell["ratio"] for cell in cells}):
        by_method: dict[str, dict[int, dict[str, Any]]] = {}
        for cell in cells:
            if cell["ratio"] == ratio:
                by_method.setdefault(cell["method"], {})[cell["seed"]] = cell
        base = by_method.get(BASELINE, {})
        for method in METHODS:
            ours = by_method.get(method, {})
            if ours and not METHODS[method].seeded:
                ours = dict.fromkeys(base, next(iter(ours.values())))
            if set(ours) & set(base):
                rows.append(_row((model, ratio, method), dense, base, ours))
    return rows


def _row(
    place: tuple[str, float, str],
    dense: dict[str, Any],
    base: dict[int, dict[str, Any]],
    ours: dict[int, dict[str, Any]],
) -> Row:
    method = place[2]
    seeds = sorted(set(ours) & set(base))
    corpora = [corpus for corpus in CORPORA if corpus in dense["texts"]]

    def losses(cells: dict[int, dict[str, Any]], corpus: str) -> list[float]:
        before = dense["texts"][corpus]["loss"]
        return [cells[seed]["texts"][corpus]["loss"] - before for seed in seeds]

    def recovered(corpus: str) -> Value | None:
        plain = losses(base, corpus)
        if min(plain) < _LEAST_LOSS:
            return None
        return Value.of([1 - own / loss for own, loss in zip(losses(ours, corpus), plain, strict=True)])

    texts = {corpus: [ours[seed]["texts"][corpus] for seed in seeds] for corpus in corpora}
    return Row(
        *place,
        ours[seeds[0]]["width"],
        len(seeds) if METHODS[method].seeded else 1,
        {corpus: Value.of([exp(text["loss"]) for text in texts[corpus]]) for corpus in corpora},
        {corpus: Value.of(losses(ours, corpus)) for corpus in corpora},
        {corpus: Value.of([text["divergence"] for text in texts[corpus]]) for corpus in corpora},
        {corpus: recovered(corpus) for corpus in corpora},
        {
            task: _accuracy(*([cells[seed]["tasks"][task] for seed in seeds] for cells in (ours, base)))
            for task in dense["tasks"]
            if all(task in cells[seed]["tasks"] for cells in (ours, base) for seed in seeds)
        },
    )


def _accuracy(ours: list[str], base: list[str]) -> Accuracy:
    items = _by_item(ours)
    differences = [a - b for a, b in zip(items, _by_item(base), strict=True)]
    return Accuracy(*_mean_and_error(items), *_mean_and_error(differences))


def _by_item(answers: list[str]) -> list[float]:
    """The share of seeds that answer each item rightly."""
    return [fmean(map(int, item)) for item in zip(*answers, strict=True)]


def _mean_and_error(values: list[float]) -> tuple[float, float]:
    return fmean(values), stdev(values) / sqrt(len(values)) if len(values) > 1 else 0.0


def table_of(dense: dict[str, dict[str, Any]], rows: list[Row], markdown: bool) -> Table:
    """The table of all models. Spreads are standard deviations over seeds, those of tasks standard errors over items."""
    tasks = sorted({task for result in dense.values() for task in result["tasks"]})
    table = Table(box=MARKDOWN if markdown else SIMPLE_HEAD, pad_edge=not markdown)
    for name in ("model", "removed", "method", "FFN"):
        table.add_column(name, no_wrap=True)
    for corpus in CORPORA:
        for name in ("ppl", "KL", "recovered"):
            table.add_column(f"{name}, {corpus}", justify="right", no_wrap=True)
    for task in tasks:
        table.add_column(task, justify="right", no_wrap=True)
        table.add_column("Δ", justify="right", no_wrap=True)
    for model, result in dense.items():
        ours = [row for row in rows if row.model == model]
        cells = [model, "0 %", "dense", str(result["width"])]
        for corpus in CORPORA:
            text = result["texts"].get(corpus)
            cells += [f"{exp(text['loss']):.2f}" if text else "", "", ""]
        for task in tasks:
            if task in result["tasks"]:
                share, error = _mean_and_error(_by_item([result["tasks"][task]]))
                cells += [f"{100 * share:.1f} ± {100 * error:.1f}", ""]
            else:
                cells += ["", ""]
        table.add_row(*cells, end_section=not markdown)
        for number, row in enumerate(ours):
            last = number + 1 == len(ours) or ours[number + 1].ratio != row.ratio
            table.add_row(*_cells(row, tasks), end_section=last and not markdown)
    return table


def _cells(row: Row, tasks: list[str]) -> list[str]:
    cells = [row.model, f"{row.ratio:.0%}".replace("%", " %"), row.method, str(row.width)]
    for corpus in CORPORA:
        if corpus not in row.loss:
            cells += ["", "", ""]
            continue
        cells.append(_text(row.perplexity[corpus], 1, 2))
        cells.append(_text(row.divergence[corpus], 1, 3))
        cells.append("" if row.method == BASELINE else share_text(row.recovered[corpus]))
    for task in tasks:
        if (accuracy := row.tasks.get(task)) is None:
            cells += ["", ""]
            continue
        cells.append(f"{100 * accuracy.share:.1f} ± {100 * accuracy.error:.1f}")
        difference = f"{100 * accuracy.against_baseline:+.1f} ± {100 * accuracy.against_error:.1f}"
        cells.append("" if row.method == BASELINE else difference)
    return cells


def _text(value: Value, factor: float, digits: int) -> str:
    spread = "" if not value.spread else f" ± {factor * value.spread:.{digits}f}"
    return f"{factor * value.mean:.{digits}f}{spread}"


def share_text(value: Value | None) -> str:
    """A share in per cent, with its spread."""
    return "–" if value is None else _text(value, 100, 0)


@dataclass(frozen=True)
class Goal:
    """One model, ratio and corpus: the share of CAMERA-P's loss that the best method recovers."""

    model: str
    ratio: float
    corpus: str
    method: str
    recovered: Value
    to_reach: float | None
    """None where no goal was set."""
    tasks_worse: list[str]
    """Tasks on which it is below CAMERA-P by more than two standard errors of the paired difference."""

    def __str__(self) -> str:
        goal = self.to_reach
        reach = "" if goal is None else f", to reach {goal:.0%}: {'met' if self.met else 'missed'}"
        worse = f"; worse on {', '.join(self.tasks_worse)}" if self.tasks_worse else ""
        share = f"{self.method} recovers {share_text(self.recovered)} % of CAMERA-P's loss"
        return f"{self.model}, {self.ratio:.0%}, {self.corpus}: {share}{reach}{worse}"

    @property
    def met(self) -> bool | None:
        """Whether the share is reached and no task is worse beyond noise."""
        return (
            None if self.to_reach is None else self.recovered.mean >= self.to_reach and not self.tasks_worse
        )


def best_method(rows: list[Row]) -> str | None:
    """The one method with a refit that recovers most, averaged over all models, ratios and corpora: one for all, so that
    none is chosen on the text that then judges it. Only methods that were measured everywhere count."""
    places = {(row.model, row.ratio) for row in rows}
    means: dict[str, float] = {}
    for name, method in METHODS.items():
        ours = [row for row in rows if row.method == name]
        if method.refits and {(row.model, row.ratio) for row in ours} == places:
            shares = [value.mean for row in ours for value in row.recovered.values() if value is not None]
            means[name] = fmean(shares) if shares else -1.0
    return max(means, key=means.__getitem__) if means else None


def goals_of(subjects: list[Subject], rows: list[Row], method: str) -> list[Goal]:
    """The goals of a method on every model, ratio and corpus where CAMERA-P loses enough to share out."""
    goals = []
    for subject in subjects:
        for row in rows:
            if row.model != subject.name or row.method != method:
                continue
            worse = [task for task, accuracy in row.tasks.items() if accuracy.worse]
            for corpus in CORPORA:
                if (value := row.recovered.get(corpus)) is not None:
                    to_reach = subject.goal(corpus, row.ratio)
                    goals.append(Goal(row.model, row.ratio, corpus, method, value, to_reach, worse))
    return goals
