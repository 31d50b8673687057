"""No calibration window may hold text that is measured on: shared runs of 13 words, GPT-3's criterion of contamination."""

import re
from collections.abc import Callable, Iterable

import torch

from camera.errors import CameraError

RUN = 13
_WORD = re.compile(r"\w+")
Runs = set[tuple[str, ...]]


def runs(text: str, length: int = RUN) -> Runs:
    """Every run of `length` words of a text, lower-cased and without punctuation."""
    words = _WORD.findall(text.lower())
    return {tuple(words[start : start + length]) for start in range(len(words) - length + 1)}


def all_runs(texts: Iterable[str]) -> Runs:
    """The runs of all texts together."""
    return set().union(*map(runs, texts))


def clean_windows(
    windows_ST: torch.Tensor, decode: Callable[[list[int]], str], forbidden: Runs, wanted: int
) -> tuple[torch.Tensor, int]:
    """The first `wanted` windows that hold no forbidden run of words.

    Args:
        windows_ST: int64 [samples, tokens], more than are wanted.
        decode: from tokens to text.
        forbidden: runs of the whole texts that are measured on.
        wanted: how many windows to give.

    Returns:
        int64 [wanted, tokens], and how many windows were left out on the way.

    Raises:
        CameraError: if too few windows are clean.
    """
    clean = []
    for number, window_T in enumerate(windows_ST):
        if runs(decode(window_T.tolist())).isdisjoint(forbidden):
            clean.append(window_T)
            if len(clean) == wanted:
                return torch.stack(clean), number + 1 - wanted
    raise CameraError(
        f"only {len(clean)} of {len(windows_ST)} calibration windows share no {RUN} words with held-out text, and "
        f"{wanted} are needed: calibrate on other text"
    )


def assert_disjoint(windows_ST: torch.Tensor, decode: Callable[[list[int]], str], forbidden: Runs) -> None:
    """Raise CameraError, quoting the words, if a calibration window holds a forbidden run."""
    for number, window_T in enumerate(windows_ST):
        if shared := runs(decode(window_T.tolist())) & forbidden:
            quote = " ".join(min(shared))
            raise CameraError(f"calibration window {number} holds text that is measured on: “{quote}”")
