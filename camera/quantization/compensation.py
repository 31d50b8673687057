"""Rounding in which later columns compensate the errors of earlier ones, into blocks of columns that share a scale.

Source: Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, 2022,
section 3, by the factor of `factor.py`. The columns go in the format's order, so a block's scale can be chosen when its
turn comes, for the weights as the errors before have moved them.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

import torch

from camera.quantization.factor import Factor

T = TypeVar("T")

_GROUP = 256
"""Columns whose best numbers are moved at once by all errors before them, in one product of large matrices."""


class Block(NamedTuple):
    """What is to be known of a block of L columns, [L, R] for R rows, to round it."""

    columns: slice
    weight_LR: torch.Tensor
    moved_LR: torch.Tensor
    """Σ Δ·M over the columns before the block."""
    inner_LL: torch.Tensor
    """M of its own columns."""
    inverse_LL: torch.Tensor
    """M⁻¹ of its own columns."""
    loss_L: torch.Tensor
    """D."""

    @property
    def best_LR(self) -> torch.Tensor:
        """Where the errors so far have moved the weights to: whoever rounds a column to e beside it then moves those
        after it on by −e times its row of `inverse_LL`, and has lost `loss_L`·e²."""
        return torch.addmm(self.weight_LR, self.inverse_LL.T, self.moved_LR)


class Loss(NamedTuple, Generic[T]):
    """What rounding loses, in the units of a factor."""

    noise: T
    """Δ·H·Δᵀ of what is stored minus what was."""
    power: T
    """w·H·wᵀ."""
    squared_error: T
    """Σ Δ²."""
    squares: T
    """Σ w²."""


def compensate(
    weight_RI: torch.Tensor,
    factor: Factor,
    blocks: Sequence[slice],
    round_block: Callable[[Block], torch.Tensor],
) -> Loss[torch.Tensor]:
    """Round the columns of a matrix block by block, each for the errors of those before.

    Args:
        weight_RI: on the device of the factor, float32.
        factor: of the moments of the inputs.
        blocks: which columns are rounded together, in order.
        round_block: gives the numbers float32 [L, R] that are stored in place of a block's weights.

    Returns:
        what each row loses, float32 [R].
    """
    rows, width = weight_RI.shape
    both_I2R = torch.empty(width, 2, rows, device=weight_RI.device)  # errors w − stored, and weights
    both_I2R[:, 1] = weight_RI.T
    both_IN = both_I2R.flatten(1)
    lost_2R = torch.zeros(2, rows, device=weight_RI.device)
    for group in _groups(blocks):
        start, stop = group[0].start, group[-1].stop
        moved_GN = factor.feedback_II[:start, start:stop].T @ both_IN[:start]
        for columns in group:
            inner_LL, loss_L = factor.feedback_II[columns, columns], factor.loss_I[columns]
            within = slice(columns.start - start, columns.stop - start)
            near = slice(start, columns.start)
            moved_LN = moved_GN[within].addmm_(factor.feedback_II[near, columns].T, both_IN[near])
            weight_LR = both_I2R[columns, 1]
            inverse_LL = torch.linalg.solve_triangular(
                inner_LL, torch.eye(len(inner_LL), device=inner_LL.device), upper=True
            )
            moved_LR = moved_LN[:, :rows]
            stored_LR = round_block(Block(columns, weight_LR, moved_LR, inner_LL, inverse_LL, loss_L))
            torch.sub(weight_LR, stored_LR, out=both_I2R[columns, 0])
            moved_LN.addmm_(inner_LL.T, both_IN[columns])
            lost_2R += (loss_L @ moved_LN.square_()).view(2, rows)
    squares_IN = both_IN.square_()
    lost_2R -= (factor.added_I @ squares_IN).view(2, rows)
    return Loss(*lost_2R, *squares_IN.sum(0).view(2, rows))


def _groups(blocks: Sequence[slice]) -> Iterator[list[slice]]:
    """Blocks that lie side by side, with about `_GROUP` columns."""
    group: list[slice] = []
    for block in blocks:
        group.append(block)
        if block.stop - group[0].start >= _GROUP:
            yield group
            group = []
    if group:
        yield group
