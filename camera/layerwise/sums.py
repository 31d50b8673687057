"""Sums as good as float64 that stay on the device where their terms are, to be read once when all has been added.

Reading a number makes the host wait for all that the device has still to do; so nothing is read while terms come in.
"""

from collections.abc import Iterable

import torch

from camera.devices import has_float64


class ExactSum:
    """A running sum of float32 terms: float64, or where a device has none, two float32 that carry what rounding loses.

    Source of the latter: Knuth, The Art of Computer Programming 2, 4.2.2: the error of a float32 sum is a float32.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device, *, wide: bool | None = None) -> None:
        """Args:
        shape: of the sum.
        device: of the terms.
        wide: whether to add in float64; None for whether the device can.
        """
        wide = has_float64(device) if wide is None else wide
        self._total = torch.zeros(shape, dtype=torch.float64 if wide else torch.float32, device=device)
        self._lost = None if wide else torch.zeros_like(self._total)

    def __getitem__(self, place: int) -> "ExactSum":
        """One row of it, to add to."""
        row = object.__new__(ExactSum)
        row._total = self._total[place]
        row._lost = None if self._lost is None else self._lost[place]
        return row

    def add(self, terms: torch.Tensor) -> None:
        """Add a term of the sum's shape, or several along one more leading dimension: these are added up first."""
        several = terms.dim() > self._total.dim()
        if self._lost is None:
            self._total += terms.double().sum(0) if several else terms.double()
            return
        for term in terms.float() if several else [terms.float()]:
            total = self._total + term
            without = total - self._total
            self._lost += (self._total - (total - without)) + (term - without)
            self._total.copy_(total)

    def read(self) -> torch.Tensor:
        """The sum so far, float64 on the CPU: one wait for the device."""
        if self._lost is None:
            return self._total.to("cpu", copy=True)
        return torch.stack([self._total, self._lost]).cpu().double().sum(0)


def energies(rows_NH: torch.Tensor, counts: Iterable[int]) -> torch.Tensor:
    """Σ of squares, float32, of each of the samples that rows are of, so many of each: terms of a sum."""
    parts = [part_NH.float().square().sum() for part_NH in rows_NH.split(list(counts))]
    return torch.stack(parts) if parts else rows_NH.new_zeros(0, dtype=torch.float32)


def sample_squares(hidden_BTI: torch.Tensor) -> torch.Tensor:
    """Σ x² over the tokens of each sample, float32 [B, I]: terms of a sum."""
    return hidden_BTI.float().square().sum(-2).reshape(-1, hidden_BTI.shape[-1])
