"""Calibration windows that hold held-out text are found, left out, and refused."""

import pytest
import torch
from quality_leaks import RUN, all_runs, assert_disjoint, clean_windows

from camera.errors import CameraError

WORDS = [f"word{number}" for number in range(100)]
HELD_OUT = " ".join(WORDS[:40])


def decode(tokens: list[int]) -> str:
    return " ".join(WORDS[token] for token in tokens)


CLEAN = list(range(50, 80))
LEAKING = [*range(60, 70), *range(5, 5 + RUN), *range(70, 77)]
NEARLY = [*range(60, 70), *range(5, 5 + RUN - 1), *range(70, 78)]


def test_a_window_with_thirteen_held_out_words_is_refused_and_the_words_are_quoted() -> None:
    windows = torch.tensor([CLEAN, LEAKING])
    with pytest.raises(CameraError, match=r"window 1 .*word5 word6"):
        assert_disjoint(windows, decode, all_runs([HELD_OUT]))


def test_twelve_shared_words_are_no_leak() -> None:
    assert_disjoint(torch.tensor([CLEAN, NEARLY]), decode, all_runs([HELD_OUT]))


def test_case_and_punctuation_do_not_hide_a_leak() -> None:
    with pytest.raises(CameraError, match="window 0"):
        assert_disjoint(torch.tensor([LEAKING]), decode, all_runs([HELD_OUT.upper().replace(" ", ", ")]))


def test_leaking_windows_are_left_out_and_counted() -> None:
    windows = torch.tensor([LEAKING, CLEAN, LEAKING, NEARLY, CLEAN])
    clean, left_out = clean_windows(windows, decode, all_runs([HELD_OUT]), 2)
    assert clean.tolist() == [CLEAN, NEARLY]
    assert left_out == 2


def test_too_few_clean_windows_are_an_error() -> None:
    with pytest.raises(CameraError, match=r"only 1 of 2 .* 2 are needed"):
        clean_windows(torch.tensor([LEAKING, CLEAN]), decode, all_runs([HELD_OUT]), 2)


def test_every_held_out_text_counts_on_its_own() -> None:
    halves = [" ".join(WORDS[:11]), " ".join(WORDS[11:40])]
    assert_disjoint(torch.tensor([LEAKING]), decode, all_runs(halves))
