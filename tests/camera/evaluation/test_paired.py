import math

import numpy as np
import pytest
from scipy.stats import binomtest

from camera.errors import CameraError
from camera.evaluation.paired import mcnemar, mean_error, paired


def test_the_difference_is_the_mean_over_questions_and_counts_who_alone_was_right() -> None:
    found = paired([1, 1, 1, 0, 0, 1, 0, 0], [1, 0, 0, 1, 0, 0, 0, 0])
    assert found.difference == pytest.approx(-2 / 8)
    assert (found.gained, found.lost) == (1, 3)
    differences = np.array([0, -1, -1, 1, 0, -1, 0, 0])
    assert found.standard_error == pytest.approx(differences.std(ddof=1) / math.sqrt(8))


def test_pairs_tell_more_than_two_separate_measurements() -> None:
    random = np.random.default_rng(0)
    original = random.integers(0, 2, 1000).astype(float)
    model = np.where(random.random(1000) < 0.05, 1 - original, original)
    separate = math.sqrt(original.var(ddof=1) / 1000 + model.var(ddof=1) / 1000)
    error = paired(original.tolist(), model.tolist()).standard_error
    assert error is not None
    assert error < separate / 2


def test_the_standard_error_is_what_resampling_the_questions_gives() -> None:
    random = np.random.default_rng(1)
    original = random.integers(0, 2, 400).astype(float)
    model = np.where(random.random(400) < 0.2, random.integers(0, 2, 400), original).astype(float)
    picks = random.integers(0, 400, (4000, 400))
    resampled = (model - original)[picks].mean(axis=1).std()
    assert paired(original.tolist(), model.tolist()).standard_error == pytest.approx(resampled, rel=0.05)


@pytest.mark.parametrize(("gained", "lost"), [(3, 10), (0, 5), (7, 7), (0, 1), (400, 460)])
def test_chance_is_the_exact_two_sided_binomial_test(gained: int, lost: int) -> None:
    assert mcnemar(gained, lost) == pytest.approx(binomtest(gained, gained + lost).pvalue)


def test_equal_models_differ_by_chance_only() -> None:
    assert mcnemar(0, 0) == 1
    assert paired([1, 0], [1, 0]) == paired([0, 1], [0, 1])


def test_thousands_of_differing_questions_are_no_overflow() -> None:
    assert 0 < mcnemar(1900, 2100) < 0.01


@pytest.mark.parametrize(("original", "model"), [([], []), ([1.0], [1.0, 0.0])])
def test_answers_that_are_no_pairs_are_refused(original: list[float], model: list[float]) -> None:
    with pytest.raises(CameraError, match="cannot be compared in pairs"):
        paired(original, model)


def test_one_question_has_no_standard_error() -> None:
    assert paired([1], [0]).standard_error is None


def test_the_error_of_a_mean_over_tasks_adds_in_squares() -> None:
    assert mean_error([0.03, 0.04]) == pytest.approx(0.025)
    assert mean_error([0.03, None]) is None
    assert mean_error([]) is None
