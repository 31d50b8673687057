"""Windows of tokens, and what a causal model computes on them: shared by every measurement on text."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from camera.errors import CameraError
from camera.loading import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGITS_AT_ONCE = 1 << 25
"""Logits that exist at once (128 MiB in float32): a vocabulary of 153,376 times a window of 2048 would be 1.2 GiB."""


def opened(model: "PreTrainedModel | Path | str", dtype: str, device: str) -> "PreTrainedModel":
    """The model itself, loaded if it is given by its place; a loaded one keeps its dtype and device."""
    return load_model(model, dtype, device) if isinstance(model, (str, Path)) else model


def cut_windows(tokens: torch.Tensor, window: int, max_windows: int | None) -> torch.Tensor:
    """Consecutive windows [W, T] of the tokens [N]; a last, partial one is dropped.

    Raises:
        CameraError: if the window or the text has fewer than two tokens.
    """
    if tokens.dim() != 1 or tokens.dtype != torch.int64:
        raise ValueError(f"tokens are {tokens.dtype} {list(tokens.shape)}, not int64 [N]")
    if window < 2 or len(tokens) < 2:
        raise CameraError(
            f"perplexity needs a window and a text of at least 2 tokens; the window is {window} and the text {len(tokens)}"
        )
    length = min(window, len(tokens))
    count = len(tokens) // length
    if max_windows is not None:
        count = min(count, max_windows)
    return tokens[: count * length].view(count, length)


def check_vocabulary(tokens: torch.Tensor, vocabulary: int) -> None:
    """Raise CameraError if a token is not in a vocabulary of so many."""
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise CameraError(
            f"the tokens reach from {low} to {high} and the model has {vocabulary}: "
            "the text was tokenised for another model"
        )


def hidden_states(model: "PreTrainedModel", batch_BT: torch.Tensor) -> torch.Tensor:
    """What the output head reads, [B, T, H], of sequences that are padded on the right if at all."""
    hidden_BTH: torch.Tensor = model.get_decoder()(
        input_ids=batch_BT.to(model.device), use_cache=False
    ).last_hidden_state
    return hidden_BTH


def pieces(rows: int, vocabulary: int, models: int = 1) -> Iterator[slice]:
    """Slices of so many rows of hidden states, each small enough for the logits of so many models at once."""
    step = max(1, LOGITS_AT_ONCE // (vocabulary * models))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
