"""Zeros in the weights that stay: Wanda's metric, unstructured or two of four. Pure functions.

Source: Sun et al., A Simple and Effective Pruning Approach for Large Language Models, 2023: weight ij matters as
|W_ij| · ‖x_j‖, compared within its output row.
"""

import torch

from camera.options import SparsityPattern

_GROUP, _ZEROS_OF_GROUP = 4, 2
_ROWS_AT_ONCE = 1024
"""Rows whose metric exists at once: 26 MB for 12,800 inputs, twice for their order."""


def sparsified(
    weight_OI: torch.Tensor, squares_I: torch.Tensor, sparsity: float, pattern: SparsityPattern
) -> torch.Tensor:
    """The weights with the least of every row, or of every four inputs of a row, set to zero.

    Args:
        weight_OI: [outputs, inputs], any floating dtype.
        squares_I: Σ x² over the calibration tokens for every input, [inputs].
        sparsity: share of each row, rounded down to whole weights; for `2:4` it is 0.5.
        pattern: `unstructured` or `2:4`; the latter needs inputs in fours.

    Returns:
        A new tensor of the same shape, dtype and device; of equals the first become zero.
    """
    inputs = weight_OI.shape[1]
    sparse_OI = weight_OI.clone()
    norms_I = squares_I.to(weight_OI.device).sqrt().float()
    for rows_RI in sparse_OI.split(_ROWS_AT_ONCE):
        metric_RI = rows_RI.float().abs() * norms_I
        if pattern == "2:4":
            groups = metric_RI.view(len(rows_RI), inputs // _GROUP, _GROUP)
            least = torch.sort(groups, dim=-1, stable=True).indices[..., :_ZEROS_OF_GROUP]
            rows_RI.view(groups.shape).scatter_(-1, least, 0)
        else:
            least = torch.sort(metric_RI, dim=-1, stable=True).indices[:, : int(inputs * sparsity)]
            rows_RI.scatter_(-1, least, 0)
    return sparse_OI


def zero_share(weight: torch.Tensor) -> float:
    """Which share of the weights is zero."""
    return 1 - int(weight.count_nonzero()) / weight.numel()
