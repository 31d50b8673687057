"""Whether right answers are more than one who knows nothing would give."""

from math import comb

import pytest

from camera.evaluation.chance import chance_level, p_by_chance


def test_chance_is_guessing_where_each_question_has_answers_of_its_own() -> None:
    assert chance_level([["cat", "dog"], ["red", "blue"]], ["0", "0"]) == 0.5
    assert chance_level([list("abcd"), list("abcde")], ["0", "1"]) == pytest.approx((1 / 4 + 1 / 5) / 2)


def test_always_giving_the_commonest_answer_needs_no_knowledge_either() -> None:
    assert chance_level([["yes", "no"]] * 10, ["0"] * 7 + ["1"] * 3) == 0.7
    assert chance_level([["yes", "no"]] * 2, ["0", "1"]) == 0.5


@pytest.mark.parametrize(
    ("right", "questions", "chance"), [(7, 10, 0.5), (0, 5, 0.2), (5, 5, 0.2), (31, 100, 0.25)]
)
def test_the_probability_is_the_tail_of_the_binomial_distribution(
    right: int, questions: int, chance: float
) -> None:
    exact = sum(
        comb(questions, k) * chance**k * (1 - chance) ** (questions - k) for k in range(right, questions + 1)
    )
    assert p_by_chance(right, questions, chance) == pytest.approx(exact, rel=1e-9)


def test_ten_thousand_questions_are_no_matter() -> None:
    assert p_by_chance(5100, 10_000, 0.5) == pytest.approx(0.0233, abs=1e-3)
