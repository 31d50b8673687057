"""How far a model's predictions are from a reference's: the Kullback-Leibler divergence on a held-out text.

Windows are those of perplexity; every token but the first of each is a prediction to compare.
Log-probabilities are float32, sums float64, the mean is over predictions.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import torch

from camera.devices import dtype_name
from camera.errors import CameraError
from camera.evaluation.text_model import TextModel
from camera.evaluation.windows import TextSettings, Windows, pieces
from camera.options import EvaluateOptions
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
    reference: "TextModel | PreTrainedModel | Path | str",
    model: "TextModel | PreTrainedModel | Path | str",
    tokens: torch.Tensor,
    *,
    progress: Progress = silent,
    **settings: Unpack[TextSettings],
) -> DivergenceResult:
    """Compare the next-token distributions of two models; both are in memory at once if they run whole.

    Args:
        reference: what `open_text_model` opens, a transformers model on its device among them.
        model: the same; what is to be judged.
        tokens: int64 [N], the whole text, at least two.
        progress: called with (windows done, windows in all).
        settings: window, max_windows, batch_size, dtype, device, layer_by_layer: see `TextSettings`.

    Raises:
        CameraError: if the vocabularies differ, there are fewer than two tokens, a token is not in the vocabulary, or
            a model computes NaN or infinity.
    """
    windows = Windows((reference, model), tokens, EvaluateOptions.model_validate(settings))
    first, second = windows.models
    if first.vocabulary != second.vocabulary:
        raise CameraError(
            f"the models have vocabularies of {first.vocabulary} and {second.vocabulary} tokens: only models of one "
            "tokenizer can be compared"
        )
    total, agreed = 0.0, 0
    for start, batch_BT, hidden_BTH in windows.run(progress):
        batch_total, batch_agreed = _compare(windows.models, hidden_BTH)
        if not math.isfinite(batch_total):
            raise CameraError(
                f"windows {start} to {start + len(batch_BT) - 1}: a model computes NaN or infinity: "
                "measure its perplexity, which names the layer"
            )
        total += batch_total
        agreed += batch_agreed
    return DivergenceResult(
        total / windows.scored,
        agreed / windows.scored,
        windows.scored,
        windows.count,
        windows.length,
        dtype_name(second.dtype),
        dtype_name(first.dtype),
        str(second.device),
    )


def _compare(models: tuple[TextModel, ...], hidden_BTH: tuple[torch.Tensor, ...]) -> tuple[float, int]:
    """Sum of the divergences of a batch, and how many likeliest tokens agree."""
    hidden_NH = [hidden[:, :-1].flatten(0, 1) for hidden in hidden_BTH]
    total, agreed = 0.0, 0
    for piece in pieces(len(hidden_NH[0]), models[0].vocabulary, models=2):
        log_p_CV, log_q_CV = (
            model.head(hidden[piece]).float().log_softmax(-1).to(models[0].device)
            for model, hidden in zip(models, hidden_NH, strict=True)
        )
        agreed += int((log_p_CV.argmax(-1) == log_q_CV.argmax(-1)).sum())
        # Summed over predictions on the CPU: an NPU has no float64 sum.
        total += float((log_p_CV.exp() * (log_p_CV - log_q_CV)).sum(-1).cpu().double().sum())
    return total, agreed
