"""Which windows of a token stream are calibrated on: the random choice of the GPTQ line of work, seed for seed.

Indices come from Python's `random`, in the order in which that code draws them, so that the same seed and text
choose the same windows as the published results did.
"""

from collections.abc import Callable
from random import Random

import torch

from camera.errors import CameraError


def joined_windows(tokens_T: torch.Tensor, samples: int, length: int, seed: int) -> torch.Tensor:
    """Random windows of one token stream; they may overlap.

    Args:
        tokens_T: int64 [tokens].
        samples: windows to take.
        length: tokens in a window.
        seed: of the choice.

    Returns:
        int64 [samples, length].

    Raises:
        CameraError: if the stream is shorter than one window.
    """
    if len(tokens_T) < length:
        raise CameraError(f"the text has {len(tokens_T)} tokens and one window needs {length}")
    random = Random(seed)
    starts = [_start(len(tokens_T), length, random) for _ in range(samples)]
    return torch.stack([tokens_T[start : start + length] for start in starts])


def document_windows(
    tokens_of: Callable[[int], torch.Tensor], documents: int, samples: int, length: int, seed: int
) -> torch.Tensor:
    """Random windows, each within one random document that is longer than a window.

    Args:
        tokens_of: gives a document's tokens, int64 [tokens], by its number. Called only for documents drawn.
        documents: how many there are.
        samples: windows to take.
        length: tokens in a window.
        seed: of the choice.

    Returns:
        int64 [samples, length].

    Raises:
        CameraError: if no document is longer than a window.
    """
    random = Random(seed)
    windows: list[torch.Tensor] = []
    too_short: dict[int, int] = {}
    while len(windows) < samples:
        number = random.randint(0, documents - 1)
        if number in too_short:
            continue
        tokens_T = tokens_of(number)
        if len(tokens_T) > length:
            start = _start(len(tokens_T), length, random)
            windows.append(tokens_T[start : start + length])
            continue
        too_short[number] = len(tokens_T)
        if len(too_short) == documents:
            raise CameraError(
                f"none of the {documents} documents is longer than a window of {length} tokens; "
                f"the longest has {max(too_short.values())}"
            )
    return torch.stack(windows)


def _start(tokens: int, length: int, random: Random) -> int:
    """The published code never takes the last possible start, except here where there is no other."""
    return random.randint(0, max(0, tokens - length - 1))
