"""Windows of tokens, and what one or two models compute on them: shared by every measurement on text."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import torch

from camera.errors import CameraError
from camera.evaluation.text_model import TextModel, open_text_model
from camera.options import EvaluateOptions
from camera.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGITS_AT_ONCE = 1 << 25
"""Logits that exist at once (128 MiB in float32): a vocabulary of 153,376 times a window of 2048 would be 1.2 GiB."""


class TextSettings(TypedDict, total=False):
    """Those of `EvaluateOptions` that are about texts, with its defaults."""

    window: int
    """Tokens per window; less where a model has fewer positions. A text shorter than that is one window."""
    max_windows: int | None
    """Read only the first so many; None: all."""
    batch_size: int
    """Windows computed at once; changes memory and speed, and the result only by rounding."""
    dtype: str
    """As for `camera.loading.load_model`; a loaded model keeps its own."""
    device: str
    """The same."""
    layer_by_layer: bool | None
    """See `open_text_model`."""


class Windows:
    """A text cut into windows [W, T], and the models that are measured on them."""

    def __init__(
        self,
        models: "Sequence[TextModel | PreTrainedModel | Path | str]",
        tokens: torch.Tensor,
        options: EvaluateOptions,
    ) -> None:
        """Open the models, and cut the text [N] into consecutive windows; a last, partial one is dropped.

        Raises:
            CameraError: if a model cannot be opened, the text has fewer than two tokens, or a token is not in the
                vocabulary.
        """
        opened = (
            open_text_model(each, options.dtype, options.device, options.layer_by_layer) for each in models
        )
        self.models: tuple[TextModel, ...] = tuple(opened)
        self.batch_size = options.batch_size
        window = min(options.window, *(model.positions for model in self.models))
        self.tokens_WT = cut_windows(tokens, window, options.max_windows)
        self.count, self.length = self.tokens_WT.shape
        low, high = int(self.tokens_WT.min()), int(self.tokens_WT.max())
        vocabulary = self.models[0].vocabulary
        if low < 0 or high >= vocabulary:
            raise CameraError(
                f"the tokens reach from {low} to {high} and the model has {vocabulary}: "
                "the text was tokenised for another model"
            )

    @property
    def scored(self) -> int:
        """Tokens that are predicted: all but the first of each window."""
        return self.count * (self.length - 1)

    def run(self, progress: Progress) -> Iterator[tuple[int, torch.Tensor, tuple[torch.Tensor, ...]]]:
        """For each batch the number of its first window, its tokens [B, T], and the hidden states of every model.

        `progress` is called with (windows done, all); of models that run layer by layer each layer counts.
        """
        total, done, start = self.count * (1 + sum(model.layers for model in self.models)), 0, 0

        def advance(windows: int) -> None:
            nonlocal done
            done += windows
            progress(done, total)

        passes = (model.hidden(self.tokens_WT, self.batch_size, advance) for model in self.models)
        with torch.inference_mode():
            for batch_BT, *hidden_BTH in zip(self.tokens_WT.split(self.batch_size), *passes, strict=True):
                yield start, batch_BT, tuple(hidden_BTH)
                start += len(batch_BT)
                advance(len(batch_BT))


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


def pieces(rows: int, vocabulary: int, models: int = 1) -> Iterator[slice]:
    """Slices of so many rows of hidden states, each small enough for the logits of so many models at once."""
    step = max(1, LOGITS_AT_ONCE // (vocabulary * models))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
