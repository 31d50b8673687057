"""Whether a model answers more questions rightly than one that knows nothing."""

import math
from collections import Counter
from collections.abc import Sequence
from statistics import fmean

CERTAIN = 0.05
"""Below this probability it is taken for more than chance."""


def chance_level(answers: Sequence[Sequence[str]], targets: Sequence[str]) -> float:
    """Share of questions that one answers rightly by guessing; where all have the same answers to choose from, such as yes and
    no, by always giving the commonest, if that is more.

    Args:
        answers: what each question lets choose from.
        targets: the right answer of each: its number, or its text.
    """
    guessing = fmean(1 / len(each) for each in answers)
    if any(tuple(each) != tuple(answers[0]) for each in answers):
        return guessing
    return max(guessing, Counter(targets).most_common(1)[0][1] / len(targets))


def p_by_chance(right: int, questions: int, chance: float) -> float:
    """Probability of so many right answers or more, each being right with the same chance (binomial, one-sided)."""
    if chance <= 0 or chance >= 1:
        return 1.0 if right <= questions * chance else 0.0
    logs = (
        math.lgamma(questions + 1) - math.lgamma(k + 1) - math.lgamma(questions - k + 1)
        + k * math.log(chance) + (questions - k) * math.log1p(-chance)
        for k in range(right, questions + 1)
    )  # fmt: skip
    return min(1.0, math.fsum(map(math.exp, logs)))
