"""What is to be reached, held against the rows of the table."""

from dataclasses import dataclass
from statistics import fmean

from quality_methods import METHODS
from quality_subjects import Subject
from quality_table import CORPORA, Row, Value


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
