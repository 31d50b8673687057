"""How far a model's predictions are from a reference's: the Kullback-Leibler divergence on a held-out text.

Windows are those of perplexity; every token but the first of each is a prediction to compare.
Log-probabilities are float32, sums float64, the mean is over predictions.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from camera.devices import dtype_name
from camera.errors import CameraError
from camera.evaluation.windows import check_vocabulary, cut_windows, hidden_states, opened, pieces
from camera.progress import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class DivergenceResult:
    """What was measured, and on what."""

    divergence: float
    """Mean over predictions of KL(reference ‖ model) = Σ_v p_v · (log p_v − log q_v), in nats."""
    top_1_agreement: float
    """Share of predictions whose likeliest token is the same."""
    tokens: int
    """Predictions compared."""
    windows: int
    window: int
    """Tokens in each window; the first is context only."""
    dtype: str
    """What the model's layers computed in."""
    reference_dtype: str
    device: str


def divergence(
    reference: "PreTrainedModel | Path | str",
    model: "PreTrainedModel | Path | str",
    tokens: torch.Tensor,
    *,
    window: int = 2048,
    max_windows: int | None = None,
    batch_size: int = 4,
    dtype: str = "auto",
    device: str = "auto",
    progress: Progress = silent,
) -> DivergenceResult:
    """Compare the next-token distributions of two models; both are in memory at once.

    Args:
        reference: what `camera.loading.load_model` opens, or a transformers model on its device.
        model: the same; what is to be judged.
        tokens: int64 [N], the whole text, at least two.
        window: tokens per window; less where either model has fewer positions.
        max_windows: compare only the first so many.
        batch_size: windows computed at once; changes memory and speed, and the result only by rounding.
        dtype, device: as for `load_model`; a loaded model keeps its own.
        progress: told (windows done, windows in all).

    Raises:
        CameraError: if the vocabularies differ, there are fewer than two tokens, a token is not in the vocabulary, or
            a model computes NaN or infinity.
    """
    first, second = opened(reference, dtype, device), opened(model, dtype, device)
    vocabulary = int(first.config.vocab_size)
    if second.config.vocab_size != vocabulary:
        raise CameraError(
            f"the models have vocabularies of {vocabulary} and {second.config.vocab_size} tokens: only models of one "
            "tokenizer can be compared"
        )
    positions = min(int(each.config.max_position_embeddings) for each in (first, second))
    windows_WT = cut_windows(tokens, min(window, positions), max_windows)
    check_vocabulary(windows_WT, vocabulary)
    count, length = windows_WT.shape
    total, agreed = 0.0, 0
    with torch.inference_mode():
        for start in range(0, count, batch_size):
            batch_BT = windows_WT[start : start + batch_size]
            batch_total, batch_agreed = _compare(first, second, batch_BT)
            if not math.isfinite(batch_total):
                raise CameraError(
                    f"windows {start} to {start + len(batch_BT) - 1}: a model computes NaN or infinity: "
                    "measure its perplexity, which names the layer"
                )
            total += batch_total
            agreed += batch_agreed
            progress(start + len(batch_BT), count)
    compared = count * (length - 1)
    return DivergenceResult(
        total / compared,
        agreed / compared,
        compared,
        count,
        length,
        dtype_name(second.dtype),
        dtype_name(first.dtype),
        str(second.device),
    )


def _compare(
    first: "PreTrainedModel", second: "PreTrainedModel", batch_BT: torch.Tensor
) -> tuple[float, int]:
    """Sum of the divergences of a batch, and how many likeliest tokens agree."""
    hidden_NH = [hidden_states(model, batch_BT)[:, :-1].flatten(0, 1) for model in (first, second)]
    heads = [model.get_output_embeddings() for model in (first, second)]
    total, agreed = 0.0, 0
    for piece in pieces(len(hidden_NH[0]), int(first.config.vocab_size), models=2):
        log_p_CV, log_q_CV = (
            head(hidden[piece]).float().log_softmax(-1).to(first.device)
            for head, hidden in zip(heads, hidden_NH, strict=True)
        )
        agreed += int((log_p_CV.argmax(-1) == log_q_CV.argmax(-1)).sum())
        # Summed over predictions on the CPU: an NPU has no float64 sum.
        total += float((log_p_CV.exp() * (log_p_CV - log_q_CV)).sum(-1).cpu().double().sum())
    return total, agreed
