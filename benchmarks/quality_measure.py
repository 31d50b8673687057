"""Perplexity and divergence from the dense model in one pass, on windows that are scored alone, all but the first token.

The same numbers as `camera.evaluation` gives; there the reference model runs again for every model that is compared,
here its log-probabilities are kept.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from camera.errors import CameraError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BATCH = 8


@dataclass(frozen=True)
class Measured:
    """One model on one text."""

    loss: float
    """ln perplexity: mean negative log-likelihood in nats per token."""
    divergence: float
    """Mean KL(dense ‖ model) in nats per token."""


class Reference:
    """The dense model's predictions on one text."""

    def __init__(self, dense: "PreTrainedModel", windows_WT: torch.Tensor) -> None:
        self.windows_WT = windows_WT
        self._log_p = list(_log_probabilities(dense, windows_WT))
        losses = [_loss(log_p, batch) for log_p, batch in zip(self._log_p, self._batches(), strict=True)]
        self.loss = sum(losses) / self.tokens

    @property
    def tokens(self) -> int:
        """Tokens that are scored."""
        windows, length = self.windows_WT.shape
        return windows * (length - 1)

    def measure(self, model: "PreTrainedModel") -> Measured:
        """Hold a model against the dense one.

        Raises:
            CameraError: if the model computes NaN or infinity.
        """
        loss = divergence = 0.0
        pairs = zip(self._log_p, _log_probabilities(model, self.windows_WT), self._batches(), strict=True)
        for log_p_BTV, log_q_BTV, batch_BT in pairs:
            loss += _loss(log_q_BTV, batch_BT)
            divergence += float((log_p_BTV.exp() * (log_p_BTV - log_q_BTV)).sum(-1).double().sum())
        if not torch.isfinite(torch.tensor(loss + divergence)):
            raise CameraError("a pruned model computes NaN or infinity: its method damaged the weights")
        return Measured(loss / self.tokens, divergence / self.tokens)

    def _batches(self) -> tuple[torch.Tensor, ...]:
        return self.windows_WT.split(_BATCH)


def _log_probabilities(model: "PreTrainedModel", windows_WT: torch.Tensor) -> Iterator[torch.Tensor]:
    """float32 [B, T - 1, V] for every batch."""
    for batch_BT in windows_WT.split(_BATCH):
        with torch.inference_mode():
            logits_BTV = model(input_ids=batch_BT, use_cache=False).logits[:, :-1].float()
            yield logits_BTV.log_softmax(-1)


def _loss(log_q_BTV: torch.Tensor, batch_BT: torch.Tensor) -> float:
    return -float(log_q_BTV.gather(-1, batch_BT[:, 1:, None]).double().sum())
