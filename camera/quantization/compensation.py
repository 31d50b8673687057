"""Rounding in which later columns compensate the errors of earlier ones, into exactly the 4-bit block formats.

Source: Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, 2022,
section 3. Rounding weight j of a row changes the layer's output; the change is made as small as possible by moving the
weights that are still to be rounded, which the inverse of the inputs' second moments says how to do. Its upper
Cholesky factor U holds all that is needed: rounding w_j to q adds ((w_j − q) / U_jj)² to the loss. The columns go in
the format's order, so a block's scale can be chosen when its turn comes, for the weights as they have been moved:
several scales round the block, and of each row the one stays that added the least.
"""

import numpy as np
import torch

from camera.errors import CameraError
from camera.quantization.q4 import HIGHEST, LOWEST, pack_rows
from camera.quantization.scales import scales_by_weightings
from camera.registry import BLOCK_FORMATS

_SHRINK = (1.0, 0.9, 0.8, 1.05, 0.95, 0.85, 0.75, 0.7, 0.6)
"""The grid of scales that is searched."""
_KEPT = 3
"""So many of them, from the first, also round the block one column after the other."""
_TINY = 1e-30
_CHUNK_ROWS = 512
"""Rows that a thread works on at once; they do not depend on each other. Fewer cost calls, more leave the cache."""
_MOST_DAMPING = 10.0


def quantize_by_gptq(
    weight: torch.Tensor,
    type: str,
    factor: torch.Tensor,
    importance: torch.Tensor | None = None,
    *,
    name: str = "the tensor",
) -> np.ndarray:
    """Numbers to blocks by error-compensated rounding.

    Args:
        weight: [rows, row_length], any floating dtype.
        type: `q4_0` or `q4_0_64`.
        factor: float32 [row_length, row_length]; what `inverse_factor` makes of the second moments of the inputs.
        importance: [row_length], the second moment of each input by itself: adds the scales that a search finds with
            it to those that are tried. None adds those of an unweighted search.
        name: of the tensor, for messages.

    Returns:
        uint8 [rows, bytes per row].

    Raises:
        CameraError: as `blocks.quantize`.
    """
    length = BLOCK_FORMATS[type].block_length
    weights = torch.ones(weight.shape[1]) if importance is None else importance.float()

    def rounding(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return compensated_codes(rows, factor, weights, length)

    return pack_rows(weight, type, rounding, _CHUNK_ROWS, name=name)


def inverse_factor(moments: torch.Tensor, damping: float, *, name: str = "the tensor") -> torch.Tensor:
    """The upper Cholesky factor U, UᵀU = (H + damping · mean(diag H) · I)⁻¹, of second moments H.

    A column whose input was never anything counts as an average one that is correlated with no other. Damping is
    raised tenfold as long as the matrix cannot be factored, which happens with fewer tokens than columns.

    Args:
        moments: [I, I], the sum of x·xᵀ over the inputs x of a layer, symmetric.
        damping: share of the mean diagonal that is added to the diagonal; above 0.
        name: of the tensor, for messages.

    Returns:
        float32 [I, I].

    Raises:
        CameraError: if the moments are not finite, or no damping makes them invertible.
    """
    matrix = moments.detach().cpu().double()
    if not matrix.isfinite().all():
        raise CameraError(
            f"{name}: the second moments of its inputs are not finite: calibrate in float32 (dtype)"
        )
    mean = matrix.diagonal().mean()
    if mean <= 0:
        return torch.eye(len(matrix))
    matrix = matrix / mean
    diagonal = matrix.diagonal()
    diagonal[diagonal == 0] = 1.0
    added = 0.0
    while damping <= _MOST_DAMPING:
        diagonal += damping - added
        added = damping
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return torch.as_tensor(upper, dtype=torch.float32)
        damping *= 10
    raise CameraError(f"{name}: the second moments of its inputs cannot be inverted: calibrate on more text")


def compensated_codes(
    weight: torch.Tensor, factor: torch.Tensor, importance: torch.Tensor, block_length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of every block.

    Args:
        weight: float32 [rows, row_length].
        factor: float32 [row_length, row_length], U.
        importance: float32 [row_length].
        block_length: of the format; divides row_length.

    Returns:
        codes float32 [rows, row_length], whole numbers from −8 to 7, and scales float32 [rows, blocks in a row].
    """
    rest = weight.clone()
    codes = torch.empty_like(rest)
    scales = torch.empty(len(rest), rest.shape[1] // block_length)
    for number, start in enumerate(range(0, rest.shape[1], block_length)):
        block = slice(start, start + block_length)
        inner = factor[block, block]
        block_LR = rest[:, block].T.contiguous()
        scale_CR = _scales_to_try(block_LR, inner, importance[block])
        codes_LCR, errors_LCR = _round_block(block_LR, scale_CR, inner)
        least_R = errors_LCR.square().sum(0).argmin(0)
        rows = torch.arange(len(rest))
        scales[:, number] = scale_CR[least_R, rows]
        codes[:, block] = codes_LCR[:, least_R, rows].T
        rest[:, block.stop :].addmm_(errors_LCR[:, least_R, rows].T, factor[block, block.stop :], alpha=-1)
    return codes, scales


def _scales_to_try(
    block_LR: torch.Tensor, inner_LL: torch.Tensor, importance_L: torch.Tensor
) -> torch.Tensor:
    """Scales [C, R] for the weights of a block: a few on a grid, and the best by two rules that know no compensation."""
    by_loss_L = inner_LL.diagonal().square().reciprocal()
    by_input_L = importance_L / importance_L.mean().clamp_min(_TINY)
    return scales_by_weightings(
        block_LR, torch.stack([by_loss_L / by_loss_L.mean(), by_input_L]), _SHRINK, _KEPT
    )


def _round_block(
    block_LR: torch.Tensor, scale_CR: torch.Tensor, inner_LL: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a block column by column with each of several scales.

    Returns:
        codes [L, C, R], and errors [L, C, R]: what each column's rounding left, over its U_jj.
    """
    rest_LCR = block_LR[:, None, :].repeat(1, len(scale_CR), 1)
    codes_LCR, errors_LCR = torch.empty_like(rest_LCR), torch.empty_like(rest_LCR)
    inverse_CR = torch.where(scale_CR == 0, 0.0, 1 / scale_CR)
    for column in range(len(rest_LCR)):
        torch.mul(rest_LCR[column], inverse_CR, out=codes_LCR[column]).round_().clamp_(LOWEST, HIGHEST)
        torch.addcmul(rest_LCR[column], codes_LCR[column], scale_CR, value=-1, out=errors_LCR[column])
        errors_LCR[column] /= inner_LL[column, column]
        following = rest_LCR[column + 1 :].flatten(1)
        following.addr_(inner_LL[column, column + 1 :], errors_LCR[column].flatten(), alpha=-1)
    return codes_LCR, errors_LCR
