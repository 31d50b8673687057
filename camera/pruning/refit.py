"""Least-squares refit of a down projection to the channels that stay. Pure functions.

Source: the normal equations of ridge regression; in pruning, the weight update of Hassibi & Stork, Second Order
Derivatives for Network Pruning: Optimal Brain Surgeon, 1993, taken over all removed channels at once.
"""

import torch


def refit(
    gram_FF: torch.Tensor, down_HF: torch.Tensor, kept_K: torch.Tensor, damping: float
) -> torch.Tensor | None:
    """W' = argmin ‖A Wᵀ − A_S W'ᵀ‖² + λ‖W' − W_S‖², λ = `damping` · mean(diag AᵀA).

    Args:
        gram_FF: AᵀA of the activations A [tokens, F], float64, symmetric.
        down_HF: W, the down projection [hidden, F], float64 on the same device.
        kept_K: int64 [K], the channels S that stay.
        damping: above 0; the larger, the nearer to W_S.

    Returns:
        W', float64 [hidden, K]; None where the equations cannot be solved, because values are not finite or all zero.
    """
    kept_K = kept_K.to(gram_FF.device)
    gone_F = torch.ones(len(gram_FF), dtype=torch.bool, device=gram_FF.device)
    gone_F[kept_K] = False
    gone_R = gone_F.nonzero()[:, 0]
    gram_KF = gram_FF.index_select(0, kept_K)
    system_KK = gram_KF.index_select(1, kept_K)
    penalty = float(damping * gram_FF.diagonal().mean())
    system_KK.diagonal().add_(penalty)
    lower_KK, failed = torch.linalg.cholesky_ex(system_KK)
    if failed or not penalty > 0:
        return None
    # W' − W_S: as much of what the removed channels put out as the kept ones can.
    missing_KH = gram_KF.index_select(1, gone_R) @ down_HF.index_select(1, gone_R).T
    return down_HF.index_select(1, kept_K) + torch.cholesky_solve(missing_KH, lower_KK).T


def output_error(
    gram_FF: torch.Tensor, down_HF: torch.Tensor, kept_K: torch.Tensor, new_HK: torch.Tensor
) -> float:
    """‖A Wᵀ − A_S W'ᵀ‖² / ‖A Wᵀ‖² from the Gram matrix of A; 0 where A Wᵀ is all zero and so is the error.

    Args:
        gram_FF: AᵀA, floating dtype.
        down_HF: W [hidden, F].
        kept_K: int64 [K], S.
        new_HK: W' [hidden, K].
    """
    lost_HF = down_HF.to(gram_FF.dtype, copy=True)
    lost_HF[:, kept_K.to(lost_HF.device)] -= new_HK.to(lost_HF)
    error = _energy(gram_FF, lost_HF)
    return error / _energy(gram_FF, down_HF.to(gram_FF.dtype)) if error else 0.0


def _energy(gram_FF: torch.Tensor, matrix_HF: torch.Tensor) -> float:
    """‖A Mᵀ‖² = tr(M AᵀA Mᵀ)."""
    return float(((matrix_HF @ gram_FF) * matrix_HF).sum())
