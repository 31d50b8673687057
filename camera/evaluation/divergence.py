"""How far a model's predictions are from a reference's: the Kullback-Leibler divergence on a held-out text.

Windows are those of perplexity; every token but the first of each is a prediction to compare.
Logits and their exponentials are float32, the divergence of a prediction and its sum float64, the mean is over predictions.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import torch

from camera.devices import dtype_name
from camera.errors import CameraError
from camera.evaluation.head import divergences
from camera.evaluation.text_model import TextModel
from camera.evaluation.windows import TextSettings, Windows
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
    """Compare the next-token distributions of two models, which run one after the other.

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
    for part in windows.run(progress):
        found_N, same_N = divergences(windows.models, part.hidden_NH, part.tell)
        part_total = float(part.scored(found_N).sum())
        if not math.isfinite(part_total):
            raise CameraError(
                f"windows {part.first} to {part.first + len(part.tokens_WT) - 1}: a model computes NaN or infinity: "
                "measure its perplexity, which names the layer"
            )
        total += part_total
        agreed += int(part.scored(same_N).sum())
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
