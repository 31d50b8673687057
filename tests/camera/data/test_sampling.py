"""The random choice of windows."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from camera.data.sampling import document_windows, joined_windows
from camera.errors import CameraError


def test_windows_of_a_stream_are_those_of_the_published_sampling() -> None:
    tokens = torch.arange(1000)
    random.seed(7)
    starts = [random.randint(0, 1000 - 64 - 1) for _ in range(5)]
    expected = torch.stack([tokens[start : start + 64] for start in starts])
    assert torch.equal(joined_windows(tokens, samples=5, length=64, seed=7), expected)


def test_windows_of_documents_are_those_of_the_published_sampling() -> None:
    lengths = [10, 70, 200, 64, 65, 30, 500]
    documents = [torch.arange(length) + 1000 * number for number, length in enumerate(lengths)]
    random.seed(3)
    expected = []
    for _ in range(6):
        while True:
            tokens = documents[random.randint(0, len(documents) - 1)]
            if len(tokens) > 64:
                break
        start = random.randint(0, len(tokens) - 64 - 1)
        expected.append(tokens[start : start + 64])
    found = document_windows(documents.__getitem__, len(documents), samples=6, length=64, seed=3)
    assert torch.equal(found, torch.stack(expected))


@given(
    tokens=st.integers(1, 300), length=st.integers(1, 300), samples=st.integers(1, 5), seed=st.integers(0, 99)
)
def test_every_window_is_a_stretch_of_the_stream(tokens: int, length: int, samples: int, seed: int) -> None:
    stream = torch.arange(tokens)
    if tokens < length:
        with pytest.raises(CameraError, match=f"{tokens} tokens and one window needs {length}"):
            joined_windows(stream, samples, length, seed)
        return
    windows = joined_windows(stream, samples, length, seed)
    assert windows.shape == (samples, length)
    assert torch.equal(windows - windows[:, :1], torch.arange(length).expand(samples, length))


def test_another_seed_chooses_other_windows() -> None:
    tokens = torch.arange(10_000)
    assert not torch.equal(joined_windows(tokens, 4, 16, seed=0), joined_windows(tokens, 4, 16, seed=1))


def test_documents_that_are_all_too_short_are_an_error_that_says_how_short() -> None:
    with pytest.raises(CameraError, match=r"none of the 3 documents.*64 tokens; the longest has 64"):
        document_windows(lambda i: torch.arange([5, 64, 30][i]), 3, samples=1, length=64, seed=0)


def test_each_short_document_is_tokenised_once() -> None:
    asked: list[int] = []

    def tokens_of(number: int) -> torch.Tensor:
        asked.append(number)
        return torch.arange(100 if number == 0 else 3)

    document_windows(tokens_of, 5, samples=20, length=10, seed=0)
    assert all(asked.count(number) <= 1 for number in range(1, 5))
