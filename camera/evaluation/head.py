"""What the output head makes of hidden states, one slice of the vocabulary after the other.

With a vocabulary of 153,376 the head of a 7B model is 1.3 GB in 16 bits, and so are the logits of 4096 tokens: on the CPU neither is
ever whole in memory. A slice of the head is read once, for all rows of hidden states, and of each row only sums are kept.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch

from camera.models.experts import Config
from camera.models.scales import Scales

SLICE_BYTES = 16 << 20
"""Of the head's weights on the CPU, that are in memory at once."""
LOGITS_AT_ONCE = 1 << 22
"""Logits that exist at once on the CPU (16 MiB in float32)."""
ACCELERATED = 8
"""On an accelerator so many times more, for it reads the head again for each piece."""

Logits = Callable[[torch.Tensor], torch.Tensor]
"""Makes logits [N, S] of hidden states [N, H] on the model's device."""


class Headed(Protocol):
    """A model that has an output head."""

    device: torch.device
    vocabulary: int
    slice_rows: int
    """Tokens of the slices that suit the head; all if it cannot be cut."""

    def head(self, first: int, stop: int) -> Logits:
        """The part of the head for some tokens."""


def finished(head: Logits, scales: Scales, config: Config) -> Logits:
    """A head whose logits are multiplied and bounded as a family has it."""
    factor, bound = scales.logits(config), scales.bound(config)
    if factor == 1 and not bound:
        return head

    def finish(hidden_NH: torch.Tensor) -> torch.Tensor:
        logits_NS = head(hidden_NH) * factor
        return logits_NS if not bound else (logits_NS / bound).tanh_().mul_(bound)

    return finish


def slice_rows(device: torch.device, vocabulary: int, row_bytes: int) -> int:
    """Rows of the slices of a head: all on an accelerator, whose memory is not what the host lacks."""
    return vocabulary if device.type != "cpu" else max(1, min(vocabulary, SLICE_BYTES // row_bytes))


def logits(
    models: Sequence[Headed], hidden_NH: Sequence[torch.Tensor], tell: Callable[[int], None]
) -> Iterator[tuple[slice, int, tuple[torch.Tensor, ...]]]:
    """All logits of models of one vocabulary, in pieces.

    Args:
        models: of one vocabulary.
        hidden_NH: what the head of each reads, the same rows on any device.
        tell: called with the number of tokens of the vocabulary that are done.

    Yields:
        the rows of a piece, the number of its first token, and the logits [C, S] of every model: float32, on the device of
        the first.
    """
    rows, device, vocabulary = len(hidden_NH[0]), models[0].device, models[0].vocabulary
    step = max(model.slice_rows for model in models)
    room = LOGITS_AT_ONCE * (1 if device.type == "cpu" else ACCELERATED)
    at_once = max(1, room // (step * len(models)))
    for first in range(0, vocabulary, step):
        stop = min(first + step, vocabulary)
        heads = [model.head(first, stop) for model in models]
        for start in range(0, rows, at_once):
            piece = slice(start, min(start + at_once, rows))
            found = (
                head(hidden[piece].to(model.device)).float().to(device)
                for model, head, hidden in zip(models, heads, hidden_NH, strict=True)
            )
            yield piece, first, tuple(found)
        del heads  # before the next are read
        tell(stop)


class Softmax:
    """Of each row of logits, gathered from slices of the vocabulary: what normalises it, and the likeliest token.

    Sums are float32, relative to the row's largest logit so far.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.likeliest_N = torch.zeros(rows, dtype=torch.int64, device=device)
        """The first of the likeliest tokens."""
        self._peak_N = torch.full((rows,), -torch.inf, device=device)
        self._sum_N = torch.zeros(rows, device=device)

    def add(self, piece: slice, first: int, logits_CS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in some rows of a slice.

        Args:
            piece: which rows.
            first: number of the slice's first token.
            logits_CS: float32.

        Returns:
            exp(logits − the largest so far), [C, S]; and by how much sums of such, that were made before, are too large, [C].
        """
        before_C = self._peak_N[piece]
        peak_C, at_C = logits_CS.max(-1)
        self.likeliest_N[piece] = torch.where(peak_C > before_C, first + at_C, self.likeliest_N[piece])
        peak_C = torch.maximum(before_C, peak_C)
        shrunk_C = (before_C - peak_C).exp()
        exp_CS = (logits_CS - peak_C[:, None]).exp_()
        self._sum_N[piece] = self._sum_N[piece] * shrunk_C + exp_CS.sum(-1)
        self._peak_N[piece] = peak_C
        return exp_CS, shrunk_C

    @property
    def sum_N(self) -> torch.Tensor:
        """Σ exp(logit − the largest), float64 on the CPU: an NPU has no float64 sum."""
        return self._sum_N.cpu().double()

    @property
    def log_sum_N(self) -> torch.Tensor:
        """log Σ exp(logit): float64 on the CPU; NaN where a logit is NaN or infinite."""
        return self._peak_N.cpu().double() + self.sum_N.log()


def log_likelihoods(
    model: Headed, hidden_NH: torch.Tensor, targets_N: torch.Tensor, tell: Callable[[int], None]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of one token in each row, and the likeliest token.

    Args:
        model: with the head.
        hidden_NH: what it reads.
        targets_N: int64, the tokens.
        tell: as of `logits`.

    Returns:
        float64 [N], NaN or infinite where a logit is; int64 [N]. On the CPU.
    """
    softmax, targets_N = Softmax(len(hidden_NH), model.device), targets_N.to(model.device)
    logit_N = torch.zeros(len(hidden_NH), device=model.device)
    for piece, first, (logits_CS,) in logits((model,), (hidden_NH,), tell):
        at_C = targets_N[piece] - first
        inside_C = (at_C >= 0) & (at_C < logits_CS.shape[1])
        found_C = logits_CS.gather(-1, at_C.clamp(0, logits_CS.shape[1] - 1)[:, None])[:, 0]
        logit_N[piece] = torch.where(inside_C, found_C, logit_N[piece])
        softmax.add(piece, first, logits_CS)
    return logit_N.cpu().double() - softmax.log_sum_N, softmax.likeliest_N.cpu()


def divergences(
    models: Sequence[Headed], hidden_NH: Sequence[torch.Tensor], tell: Callable[[int], None]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ_v p_v · (log p_v − log q_v) of each row, for the predictions p and q of two models.

    One pass over the slices: it is Σ p_v · (x_v − y_v) − (log Σ exp x − log Σ exp y), where x and y are their logits.

    Args:
        models: that of p, that of q.
        hidden_NH: what the head of each reads.
        tell: as of `logits`.

    Returns:
        float64 [N], in nats, NaN or infinite where a logit is; and whether the likeliest token is the same, [N]. On the CPU.
    """
    rows, device = len(hidden_NH[0]), models[0].device
    p, q, gap_N = Softmax(rows, device), Softmax(rows, device), torch.zeros(rows, device=device)
    for piece, first, (x_CS, y_CS) in logits(models, hidden_NH, tell):
        exp_CS, shrunk_C = p.add(piece, first, x_CS)
        gap_N[piece] = gap_N[piece] * shrunk_C + exp_CS.mul_(x_CS.sub_(y_CS)).sum(-1)
        q.add(piece, first, y_CS)
    found_N = gap_N.cpu().double() / p.sum_N - (p.log_sum_N - q.log_sum_N)
    return found_N, (p.likeliest_N == q.likeliest_N).cpu()
