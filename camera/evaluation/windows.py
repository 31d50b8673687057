"""Windows of tokens, and what one or two models compute on them: shared by every measurement on text."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import torch

from camera.errors import CameraError
from camera.evaluation.text_model import TextModel, open_text_model, windows_at_once
from camera.options import EvaluateOptions
from camera.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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

    def run(self, progress: Progress) -> Iterator["Part"]:
        """The windows in parts, with the hidden states of every model.

        `progress` is called with (windows done, all); of models that run layer by layer each layer counts.
        """
        total, done = self.count * (1 + sum(model.layers for model in self.models)), 0

        def advance(windows: int) -> None:
            nonlocal done
            done += windows
            progress(done, total)

        first, at_once = 0, windows_at_once(self.models, self.length, self.batch_size)
        with torch.inference_mode():
            for part_WT in self.tokens_WT.split(at_once):
                hidden = [model.hidden(part_WT, self.batch_size, advance) for model in self.models]
                before = done

                def head(tokens: int, before: int = before, windows: int = len(part_WT)) -> None:
                    advance(before + windows * tokens // self.models[0].vocabulary - done)

                yield Part(first, part_WT, [each.flatten(0, 1) for each in hidden], head)
                first += len(part_WT)


class Part(NamedTuple):
    """Some windows, and what models have made of them."""

    first: int
    """Number of the first window."""
    tokens_WT: torch.Tensor
    hidden_NH: list[torch.Tensor]
    """By model: what the output head reads, of the tokens of all windows."""
    tell: Callable[[int], None]
    """To be told how many tokens of the vocabulary are done."""

    def scored(self, found_N: torch.Tensor) -> torch.Tensor:
        """Of what was found for every token of the windows, what is of predictions: [W, T - 1]."""
        return found_N.view(self.tokens_WT.shape)[:, :-1]


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
