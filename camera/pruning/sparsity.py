"""Zeros in the weights that stay: Wanda's metric. Pure functions.

Source: Sun et al., A Simple and Effective Pruning Approach for Large Language Models, 2023: weight ij matters as
|W_ij| · ‖x_j‖, compared within its output row.
"""

import torch

_ROWS_AT_ONCE = 128
"""Rows whose metric exists at once: 7 MB for 12,800 inputs, twice for their order."""


def sparsified(weight_OI: torch.Tensor, squares_I: torch.Tensor, sparsity: float) -> torch.Tensor:
    """The weights with the least of every row set to zero.

    Args:
        weight_OI: [outputs, inputs], any floating dtype.
        squares_I: Σ x² over the calibration tokens for every input, [inputs].
        sparsity: share of each row, rounded down to whole weights.

    Returns:
        A new tensor of the same shape, dtype and device; of equals the first become zero.
    """
    sparse_OI = weight_OI.clone()
    norms_I = squares_I.to(weight_OI.device).sqrt().float()
    zeros = int(weight_OI.shape[1] * sparsity)
    for rows_RI in sparse_OI.split(_ROWS_AT_ONCE):
        order_RI = torch.sort(rows_RI.float().abs() * norms_I, dim=-1, stable=True).indices
        rows_RI.scatter_(-1, order_RI[:, :zeros], 0)
    return sparse_OI


def zero_share(weight: torch.Tensor) -> float:
    """Which share of the weights is zero."""
    return 1 - int(weight.count_nonzero()) / weight.numel()
