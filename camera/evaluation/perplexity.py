"""Perplexity of a causal language model on a text that is already tokens.

The protocol is that of the GPTQ and CAMERA evaluations: the text is joined and tokenised once, cut into consecutive
windows that do not overlap, and each window is scored alone, every token but its first; a last, partial window is
dropped. Logits and their exponentials are float32, the loss of a token and its sum float64, the mean is over scored tokens.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import torch

from camera.devices import dtype_name
from camera.errors import CameraError
from camera.evaluation.head import log_likelihoods
from camera.evaluation.text_model import TextModel
from camera.evaluation.windows import TextSettings, Windows
from camera.options import EvaluateOptions
from camera.progress import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class PerplexityResult:
    """What was measured, and on what."""

    perplexity: float
    """exp(nll_sum / tokens)."""
    nll_sum: float
    """Sum of the negative log-likelihoods of the scored tokens, in nats."""
    tokens: int
    """Scored tokens."""
    windows: int
    """Windows scored."""
    window: int
    """Tokens in each window; the first is context only."""
    dtype: str
    """What the layers computed in."""
    device: str


def perplexity(
    model: "TextModel | PreTrainedModel | Path | str",
    tokens: torch.Tensor,
    *,
    progress: Progress = silent,
    **settings: Unpack[TextSettings],
) -> PerplexityResult:
    """Measure perplexity.

    Args:
        model: what `open_text_model` opens, a transformers model on its device among them.
        tokens: int64 [N], the whole text, at least two.
        progress: called with (windows done, windows in all).
        settings: window, max_windows, batch_size, dtype, device, layer_by_layer: see `TextSettings`.

    Raises:
        CameraError: if there are fewer than two tokens, a token is not in the vocabulary, or the model computes NaN
            or infinity.
    """
    windows = Windows((model,), tokens, EvaluateOptions.model_validate(settings))
    [opened] = windows.models
    nll_sum = 0.0
    for part in windows.run(progress):
        targets_N = part.tokens_WT.roll(-1, 1).flatten()  # the last of each window is none
        log_p_N, _ = log_likelihoods(opened, part.hidden_NH[0], targets_N, part.tell)
        for row, nll in enumerate((-part.scored(log_p_N)).sum(-1).tolist()):
            if not math.isfinite(nll):
                raise CameraError(_damage(opened, part.tokens_WT[row : row + 1], part.first + row))
            nll_sum += nll
    mean = nll_sum / windows.scored
    try:
        value = math.exp(mean)
    except OverflowError:
        raise CameraError(
            f"the mean loss is {mean:.0f} nats per token, beyond any perplexity: the weights are damaged"
        ) from None
    return PerplexityResult(
        value,
        nll_sum,
        windows.scored,
        windows.count,
        windows.length,
        dtype_name(opened.dtype),
        str(opened.device),
    )


def _damage(model: TextModel, window_1T: torch.Tensor, number: int) -> str:
    """Run a failing window again, to name the first decoder layer that computes NaN or infinity."""
    states = enumerate(model.states(window_1T))
    layer = next((index for index, state in states if not bool(torch.isfinite(state).all())), None)
    where = "the final norm or the output head" if layer is None else f"decoder layer {layer}"
    advice = (
        "float16 overflows above 65504: measure in bfloat16 or float32"
        if model.dtype == torch.float16
        else "the weights are damaged, or were damaged by a step before this one"
    )
    return f"window {number}: {where} computes NaN or infinity in {dtype_name(model.dtype)}; {advice}"
