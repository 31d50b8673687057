"""Perplexity of a causal language model on a text that is already tokens.

The protocol is that of the GPTQ and CAMERA evaluations: the text is joined and tokenised once, cut into consecutive
windows that do not overlap, and each window is scored alone, every token but its first; a last, partial window is
dropped. The loss is float32, its sum float64, the mean is over scored tokens.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from camera.devices import dtype_name
from camera.errors import CameraError
from camera.evaluation.windows import check_vocabulary, cut_windows, hidden_states, opened, pieces
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
    model: "PreTrainedModel | Path | str",
    tokens: torch.Tensor,
    *,
    window: int = 2048,
    max_windows: int | None = None,
    batch_size: int = 4,
    dtype: str = "auto",
    device: str = "auto",
    progress: Progress = silent,
) -> PerplexityResult:
    """Measure perplexity.

    Args:
        model: what `camera.loading.load_model` opens, or a transformers model that is already on its device.
        tokens: int64 [N], the whole text, at least two.
        window: tokens per window; the model's `max_position_embeddings` if that is less. A text shorter than that
            is one window.
        max_windows: score only the first so many.
        batch_size: windows computed at once; changes memory and speed, and the result only by rounding.
        dtype, device: as for `load_model`; a loaded model keeps its own.
        progress: told (windows done, windows in all).

    Raises:
        CameraError: if there are fewer than two tokens, a token is not in the vocabulary, or the model computes NaN
            or infinity.
    """
    loaded = opened(model, dtype, device)
    windows_WT = cut_windows(tokens, min(window, int(loaded.config.max_position_embeddings)), max_windows)
    check_vocabulary(windows_WT, loaded.get_input_embeddings().get_parameter("weight").shape[0])
    count, length = windows_WT.shape
    nll_sum = 0.0
    with torch.inference_mode():
        for first in range(0, count, batch_size):
            batch_BT = windows_WT[first : first + batch_size].to(loaded.device)
            for row, nll in enumerate(_score(loaded, batch_BT)):
                if not math.isfinite(nll):
                    raise CameraError(_damage(loaded, batch_BT[row : row + 1], first + row))
                nll_sum += nll
            progress(first + len(batch_BT), count)
    scored = count * (length - 1)
    try:
        value = math.exp(nll_sum / scored)
    except OverflowError:
        raise CameraError(
            f"the mean loss is {nll_sum / scored:.0f} nats per token, beyond any perplexity: the weights are damaged"
        ) from None
    return PerplexityResult(
        value, nll_sum, scored, count, length, dtype_name(loaded.dtype), str(loaded.device)
    )


def _score(model: "PreTrainedModel", batch_BT: torch.Tensor) -> list[float]:
    """Negative log-likelihood of each window; NaN for a window whose logits are not all finite."""
    hidden_BTH = hidden_states(model, batch_BT)
    head, vocabulary = model.get_output_embeddings(), int(model.config.vocab_size)
    return [
        math.fsum(
            _nll(head, hidden_TH[piece], targets_T[piece]) for piece in pieces(len(targets_T), vocabulary)
        )
        for hidden_TH, targets_T in zip(hidden_BTH[:, :-1], batch_BT[:, 1:], strict=True)
    ]


def _nll(head: nn.Module, hidden_CH: torch.Tensor, targets_C: torch.Tensor) -> float:
    logits_CV = head(hidden_CH).float()
    if not bool(torch.isfinite(logits_CV).all()):
        return math.nan
    # Summed on the CPU: an NPU has no float64 sum.
    return float(F.cross_entropy(logits_CV, targets_C, reduction="none").cpu().double().sum())


def _damage(model: "PreTrainedModel", window_1T: torch.Tensor, number: int) -> str:
    """Run a failing window again, to name the first decoder layer that computes NaN or infinity."""
    layer = next((index for index, finite in _finite_layers(model, window_1T) if not finite), None)
    where = "the final norm or the output head" if layer is None else f"decoder layer {layer}"
    advice = (
        "float16 overflows above 65504: measure in bfloat16 or float32"
        if model.dtype == torch.float16
        else "the weights are damaged, or were damaged by a step before this one"
    )
    return f"window {number}: {where} computes NaN or infinity in {dtype_name(model.dtype)}; {advice}"


def _finite_layers(model: "PreTrainedModel", window_1T: torch.Tensor) -> Iterator[tuple[int, bool]]:
    hidden = model.get_decoder()(
        input_ids=window_1T, use_cache=False, output_hidden_states=True
    ).hidden_states
    # hidden[0] is the embedding; the last entry has passed the final norm, which leaves NaN and infinity in place.
    for layer, state in enumerate(hidden[1:]):
        yield layer, bool(torch.isfinite(state).all())
