"""The Gram matrix of what enters `down_proj`: all that a refit and a selection by OBS need to know of the tokens.

It is kept apart for the samples that weights are fitted to and for those held back to check them. Two float32 [F, F] on
the layer's device, 655 MB each for 12,800 channels, live as long as their layer is visited. What is computed from them
is computed in float64, and takes of the two no more than it needs (`Moments`).
"""

from collections.abc import Iterable
from itertools import repeat

import torch

from camera.layerwise.collectives import Collectives
from camera.layerwise.sums import ExactSum

_HELD_BACK_SHARE = 8
_BLOCKS = 8
"""Column blocks of a product: only those on and above the diagonal are computed, 9/16 of the work."""
_LEAST_BLOCK = 128
_ROWS_AT_ONCE = 1024
_LEAST_POWER = 2.0**-40
"""Of a token's stream that counts as more than nothing."""


class LayerGram:
    """AᵀA of one decoder layer's activations A [tokens, F], over all samples seen."""

    def __init__(self, width: int, device: torch.device, target: "Target | None" = None) -> None:
        """Args:
        width: F.
        device: of the layer.
        target: what else the output should make good, if anything.
        """
        self._fit_FF = torch.zeros(width, width, device=device)
        self._held_FF = torch.zeros(width, width, device=device)
        self.target = target
        self.fit_tokens = 0
        self.held_tokens = 0

    def update(
        self,
        samples: Iterable[torch.Tensor],
        held: Iterable[bool],
        missing: Iterable[torch.Tensor | None] = repeat(None),
    ) -> None:
        """Add activations.

        Args:
            samples: [tokens, F] of each sample on the layer's device, of any floating dtype: a tensor [batch, tokens, F]
                will do.
            held: which samples are held back.
            missing: [tokens, hidden] of each sample, what the layer's output lacks, where there is a target.
        """
        # One by one: the same whatever the batch size.
        for act_TF, kept_back, missing_TH in zip(samples, held, missing, strict=False):
            if self.target is not None and missing_TH is not None:
                self.target.add(act_TF, missing_TH, kept_back)
            if kept_back:
                self.held_tokens += len(act_TF)
                _add_products(self._held_FF, act_TF)
            else:
                self.fit_tokens += len(act_TF)
                _add_products(self._fit_FF, act_TF)

    def merge(self, ranks: Collectives) -> None:
        """Make this the Gram matrix of all ranks' samples."""
        tokens = torch.tensor([self.fit_tokens, self.held_tokens])
        for sums in (tokens, self._fit_FF, self._held_FF):
            ranks.all_reduce(sums)
        if self.target is not None:
            self.target.merge(ranks)
        self.fit_tokens, self.held_tokens = tokens.tolist()

    def parts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The matrices of the fitted and of the held-back samples: float32 [F, F] on the layer's device, symmetric."""
        for matrix_FF in (self._fit_FF, self._held_FF):
            _mirror(matrix_FF)
        return self._fit_FF, self._held_FF


class Moments:
    """A sum of Gram matrices [F, F], of which parts are taken in float64: whole, it would be as large as two of them."""

    def __init__(self, *grams_FF: torch.Tensor) -> None:
        self._grams_FF = grams_FF

    @property
    def width(self) -> int:
        """F."""
        return len(self._grams_FF[0])

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self._grams_FF[0].device

    def mean(self) -> float:
        """Of the diagonal."""
        first, *others = (gram_FF.diagonal().double() for gram_FF in self._grams_FF)
        return float(sum(others, first).mean())

    def wide(self) -> torch.Tensor:
        """All of it, float64 [F, F], new."""
        first_FF, *others_FF = self._grams_FF
        whole_FF = first_FF.to(torch.float64, copy=True)
        for gram_FF in others_FF:
            whole_FF += gram_FF
        return whole_FF

    def select(self, rows_R: torch.Tensor, columns_C: torch.Tensor) -> torch.Tensor:
        """Float64 [R, C]: what is asked for, a few rows at a time."""
        first_FF, *others_FF = self._grams_FF
        found_RC = torch.empty(len(rows_R), len(columns_C), dtype=torch.float64, device=self.device)
        for part_PC, rows_P in zip(found_RC.split(_ROWS_AT_ONCE), rows_R.split(_ROWS_AT_ONCE), strict=True):
            part_PC.copy_(first_FF.index_select(0, rows_P).index_select(1, columns_C))
            for gram_FF in others_FF:
                part_PC += gram_FF.index_select(0, rows_P).index_select(1, columns_C)
        return found_RC


class Target:
    """What the layer's output lacks at the tokens of a block, R [tokens, hidden], as far as least squares need to know it.

    Attributes:
        fit_FH, held_FH: AᵀR of the fitted and of the held-back samples, float32 [F, hidden] on the layer's device.
        held_energy: ‖R‖² of the held-back samples, float64, one number on the CPU; known once merged.
        damping: what is added to every diagonal element of AᵀA when R is fitted apart from the rest; None where it is not.
    """

    def __init__(self, width: int, hidden: int, device: torch.device, damping: float | None) -> None:
        self.fit_FH = torch.zeros(width, hidden, device=device)
        self.held_FH = torch.zeros(width, hidden, device=device)
        self.held_energy = torch.zeros((), dtype=torch.float64)
        self._energy = ExactSum((), device)
        self.damping = damping

    def add(self, act_TF: torch.Tensor, missing_TH: torch.Tensor, held: bool) -> None:
        """Add the tokens of one sample."""
        missing_TH = missing_TH.float()
        (self.held_FH if held else self.fit_FH).addmm_(act_TF.float().T, missing_TH)
        if held:
            self._energy.add(missing_TH.square().sum())

    def merge(self, ranks: Collectives) -> None:
        """Make this the target of all ranks' samples."""
        self.held_energy = self._energy.read()
        for sums in (self.fit_FH, self.held_FH, self.held_energy):
            ranks.all_reduce(sums)


def token_scales(stream_BTH: torch.Tensor) -> torch.Tensor:
    """What a token's residual stream is multiplied by before the next layer reads it: about 1 / its root mean square.

    A few tokens, as the first of a text, have a stream hundreds of times as large as others. The next layers normalise it,
    so that what counts is the error against that. Powers of two, which leave every bit of what they scale.

    Args:
        stream_BTH: [batch, tokens, hidden], floating dtype.

    Returns:
        float32 [batch, tokens, 1] on the same device.
    """
    power = stream_BTH.float().square().mean(-1, keepdim=True).clamp_min(_LEAST_POWER)
    return torch.exp2(-power.log2().div(2).round())


def held_back(samples: int) -> list[bool]:
    """Which samples are held back to check a refit: one of eight, spread evenly; at least one of two or more."""
    count = max(1, round(samples / _HELD_BACK_SHARE)) if samples > 1 else 0
    chosen = {(number + 1) * samples // count - 1 for number in range(count)}
    return [index in chosen for index in range(samples)]


def _step(width: int) -> int:
    return max(_LEAST_BLOCK, -(-width // _BLOCKS))


def _add_products(total_FF: torch.Tensor, act_TF: torch.Tensor) -> None:
    """Add AᵀA to the blocks on and above the diagonal."""
    width, step = len(total_FF), _step(len(total_FF))
    # A CUDA device multiplies half precision into float32 sums; elsewhere the sums would be rounded to half precision.
    wide = act_TF.device.type == "cuda" and act_TF.dtype != torch.float32
    if not wide:
        act_TF = act_TF.float()
    for start in range(0, width, step):
        rows_TR, rest_TC = act_TF[:, start : start + step], act_TF[:, start:]
        part_RC = total_FF[start : start + step, start:]
        if wide:
            part_RC += torch.mm(rows_TR.T, rest_TC, out_dtype=torch.float32)
        else:
            part_RC.addmm_(rows_TR.T, rest_TC)


def _mirror(total_FF: torch.Tensor) -> None:
    """Fill the blocks below the diagonal from those above."""
    width, step = len(total_FF), _step(len(total_FF))
    for start in range(0, width, step):
        stop = start + step
        total_FF[stop:, start:stop] = total_FF[start:stop, stop:].T
