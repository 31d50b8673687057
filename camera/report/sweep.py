"""The results of a sweep: a row for every member, and which models lie on the Pareto front of size and perplexity."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from camera.report.schema import ModelRow, Results
from camera.report.words import quoted_row
from camera.results import Result


class SweepRow(Result):
    """One member of a sweep, by the model that it was for; or why there is none."""

    name: str
    label: str
    """What varies, in short: `p20 q4_0`."""
    varied: dict[str, Any]
    """Values by the field that varies."""
    model: ModelRow | None = None
    """Size and perplexity of the product; None where the member failed."""
    removed_share: float | None = None
    """Of the FFN channels of every layer."""
    decode_ms: float | None = None
    """Median time of a token at the longest decoding, on the first engine that was timed."""
    decode_speedup: float | None = None
    """Against the baseline, same run."""
    noisy: bool = False
    """Whether the runs of that time lie too far apart."""
    gate: Literal["passed", "failed"] | None = None
    """What the recipe's quality gate says; None if there is none."""
    gate_reasons: tuple[str, ...] = ()
    failure: str | None = None
    """Why there is no result."""
    on_front: tuple[str, ...] = ()
    """The texts on which no other model is as small and as good."""


class SweepResults(Result):
    """All that a sweep found. `sweep.json` has this shape."""

    name: str
    base_model: str
    varied: tuple[str, ...]
    """The fields that vary."""
    references: tuple[ModelRow, ...]
    """The original, and the baseline (the original in 4 bits), as the first member that has them measured them."""
    rows: tuple[SweepRow, ...]
    references_on_front: dict[str, tuple[str, ...]]
    """For each text, the references (by id) that no member beats."""
    workers: int = 1
    """Members that ran at once: with more than one, speeds were measured beside other work."""
    schema_version: Literal[1] = 1

    @property
    def texts(self) -> tuple[str, ...]:
        """Labels of all texts."""
        models = [*self.references, *(row.model for row in self.rows if row.model is not None)]
        return tuple(dict.fromkeys(text for model in models for text in model.perplexity))

    @property
    def reference_rows(self) -> tuple[SweepRow, ...]:
        """The references in the shape of a member; nothing varied."""
        return tuple(
            SweepRow(
                name=model.title,
                label=model.title,
                varied={},
                model=model,
                on_front=tuple(text for text, ids in self.references_on_front.items() if model.id in ids),
            )
            for model in self.references
        )

    @property
    def failed(self) -> tuple[SweepRow, ...]:
        """The members without a result."""
        return tuple(row for row in self.rows if row.failure is not None)


@dataclass(frozen=True)
class MemberResults:
    """Results of a member, or the reason why there are none."""

    name: str
    label: str
    varied: Mapping[str, Any]
    results: Results | None
    failure: str | None = None


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points no other beats: none is at most as large in both numbers, and smaller in one.

    Equal points are all on it; a point that is no number is not.
    """

    def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
        return one[0] <= other[0] and one[1] <= other[1] and one != other

    numbers = [point for point in points if point[0] == point[0] and point[1] == point[1]]
    return [point in numbers and not any(beats(other, point) for other in numbers) for point in points]


def collect_sweep(
    name: str, varied: Sequence[str], members: Sequence[MemberResults], workers: int = 1
) -> SweepResults:
    """Gather the results of a sweep.

    Args:
        name: of the sweep.
        varied: the fields that vary.
        members: in the order of the sweep.
        workers: how many members ran at once.
    """
    done = [member.results for member in members if member.results is not None]
    references = _references(done)
    rows = [_row(member) for member in members]
    on_front: dict[str, list[str]] = {}
    for text in dict.fromkeys(text for results in done for text in results.datasets):
        # A member that is no smaller and no better than the unpruned baseline is worth nothing: references compete.
        candidates = [(row.name, row.model) for row in rows] + [(model.id, model) for model in references]
        places = {
            owner: (model.bytes, model.perplexity[text].value)
            for owner, model in candidates
            if model is not None and model.bytes is not None and text in model.perplexity
        }
        on_front[text] = [
            owner for owner, best in zip(places, front([*places.values()]), strict=True) if best
        ]
    return SweepResults(
        name=name,
        base_model=done[0].base_model if done else "",
        varied=tuple(varied),
        references=references,
        rows=tuple(
            row.model_copy(update={"on_front": tuple(t for t, best in on_front.items() if row.name in best)})
            for row in rows
        ),
        references_on_front={
            text: tuple(model.id for model in references if model.id in best)
            for text, best in on_front.items()
        },
        workers=workers,
    )


def read_sweep(path: Path) -> SweepResults:
    """Read a `sweep.json`."""
    return SweepResults.read(path, "make the report of the sweep again")


def summary(results: SweepResults) -> str:
    """One sentence: how many members, how many failed, and which are on the front."""
    count, failed = len(results.rows), len(results.failed)
    best = [row.label for row in results.rows if row.on_front]
    rejected = sum(row.gate == "failed" for row in results.rows)
    parts = [f"{count} member{'s' if count != 1 else ''} over {' × '.join(results.varied)}"]
    if failed:
        parts.append(f"{failed} failed")
    if rejected:
        parts.append(f"{rejected} fail{'s' if rejected == 1 else ''} the quality gate")
    if best:
        parts.append(f"on the Pareto front of size and perplexity: {', '.join(best)}")
    elif failed < count:
        parts.append("none on the Pareto front: the unpruned models are as small and better")
    return "; ".join(parts) + "."


def best_member(results: SweepResults) -> SweepRow | None:
    """The smallest member that passes the gate, of equals the one with the lowest perplexity; None if none passes."""

    def order(row: SweepRow) -> tuple[float, float]:
        assert row.model is not None
        changes = [score.change or 0.0 for score in row.model.perplexity.values()]
        return float(row.model.bytes or "inf"), sum(changes)

    passed = [row for row in results.rows if row.gate == "passed" and row.model is not None]
    return min(passed, key=order, default=None)


def _references(done: Sequence[Results]) -> tuple[ModelRow, ...]:
    found = (
        next((row for results in done if (row := results.row(model)) is not None and row.perplexity), None)
        for model in ("original", "baseline")
    )
    return tuple(row for row in found if row is not None)


def _row(member: MemberResults) -> SweepRow:
    about: dict[str, Any] = {"name": member.name, "label": member.label, "varied": dict(member.varied)}
    results = member.results
    if results is None:
        return SweepRow(**about, failure=member.failure or "it has no results")
    quoted = quoted_row(results)
    return SweepRow(
        **about,
        model=results.product,
        removed_share=None if results.prune is None else results.prune.removed_share,
        decode_ms=None if quoted is None or quoted.decode_ms is None else quoted.decode_ms.median,
        decode_speedup=None if quoted is None else quoted.decode_speedup,
        noisy=quoted is not None and quoted.noisy,
        gate=None if results.gate is None else results.gate.verdict,
        gate_reasons=() if results.gate is None else results.gate.reasons,
        failure=member.failure,
    )
