"""Two models on the same questions: their difference, and whether it is more than chance.

Both answer every question, and most answers agree. So the differences per question vary far less than the answers,
and their standard error is much smaller than that of two separate measurements.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from camera.errors import CameraError


@dataclass(frozen=True)
class Paired:
    """A model against the original."""

    difference: float
    """Mean over questions of (model − original): −0.02 is two points worse."""
    standard_error: float | None
    """Of that mean; None if there is one question only."""
    gained: int
    """Questions that only the model answers rightly."""
    lost: int
    """Questions that only the original answers rightly."""
    p_value: float
    """Exact McNemar test, two-sided: how likely so uneven a split of gained and lost is if neither is better."""


def paired(original: Sequence[float], model: Sequence[float]) -> Paired:
    """Compare two models on the same questions.

    Args:
        original: 1 for each question answered rightly, 0 for each answered wrongly.
        model: the same questions in the same order.

    Raises:
        CameraError: if these are not equally many, or none.
    """
    if not original or len(original) != len(model):
        raise CameraError(f"{len(original)} and {len(model)} answers cannot be compared in pairs")
    differences = [after - before for before, after in zip(original, model, strict=True)]
    gained = sum(difference > 0 for difference in differences)
    lost = sum(difference < 0 for difference in differences)
    count = len(differences)
    return Paired(
        fmean(differences),
        stdev(differences) / math.sqrt(count) if count > 1 else None,
        gained,
        lost,
        mcnemar(gained, lost),
    )


def mcnemar(gained: int, lost: int) -> float:
    """Probability of a split at least so uneven of the questions that only one of two models answers rightly.

    Exact: each such question is the toss of a fair coin (McNemar 1947, in its binomial form).
    """
    tosses, fewer = gained + lost, min(gained, lost)
    # Integers, not floats: 2^tosses is beyond them from 1024 questions on.
    ways = sum(math.comb(tosses, heads) for heads in range(fewer + 1))
    return min(1.0, 2 * ways / (1 << tosses)) if tosses else 1.0


def mean_error(standard_errors: Sequence[float | None]) -> float | None:
    """Standard error of the plain mean of independent values; None if one of theirs is unknown."""
    if not standard_errors or any(error is None for error in standard_errors):
        return None
    return math.sqrt(math.fsum(error**2 for error in standard_errors if error is not None)) / len(
        standard_errors
    )
