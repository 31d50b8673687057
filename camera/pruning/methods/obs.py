"""Optimal Brain Surgeon: what a removal costs after the other channels have compensated for it; then the same refit.

Source: Hassibi & Stork, Optimal Brain Surgeon, 1993; for whole columns as in Kurtić et al., ZipLM, 2023. Removing column
c of W costs ‖w_c‖² / [H⁻¹]_cc, H = AᵀA + λI, when the columns that stay take over what it did.
"""

import torch

from camera.layerwise.gram import Moments
from camera.pruning.methods import ObservedBlock
from camera.pruning.methods.refit import FACTOR_SLOWNESS, Refit
from camera.pruning.plan import PrunePlan
from camera.registry import PRUNING_METHODS


class Obs(Refit):
    """OBS's channels, refitted."""

    name = "obs"
    title = "the cost of a removal by Optimal Brain Surgeon"

    def choose(
        self,
        block: ObservedBlock,
        fit_FF: torch.Tensor,
        held_FF: torch.Tensor,
        down_HF: torch.Tensor,
        plan: PrunePlan,
    ) -> torch.Tensor:
        gram = Moments(fit_FF, held_FF)
        kept_K = obs_channels(gram, down_HF, block.kept, min(plan.dampings), plan.round)
        if kept_K is None:
            raise ValueError("its Gram matrix cannot be inverted")
        return kept_K

    def multiplications(self, width: int, hidden: int, kept: int, dampings: int) -> int:
        rounds = FACTOR_SLOWNESS * width**3 + (width - kept) * width * (width + hidden)
        return super().multiplications(width, hidden, kept, dampings) + rounds


def obs_channels(
    gram: Moments, down_HF: torch.Tensor, count: int, damping: float, per_round: int
) -> torch.Tensor | None:
    """The `count` channels that stay when the cheapest go in rounds, weights and inverse being updated after each.

    Args:
        gram: AᵀA of the activations [F, F], symmetric.
        down_HF: the down projection [hidden, F], float64 on the same device.
        count: how many stay.
        damping: λ as a share of the mean diagonal; above 0.
        per_round: how many go in a round; of equally cheap ones the first.

    Returns:
        int64 [count] on the CPU, ascending; None where the matrix cannot be inverted.
    """
    penalty = damping * gram.mean()
    inverse_FF = gram.wide()  # one name through its changes, to hold no more than two such matrices
    inverse_FF.diagonal().add_(penalty)
    inverse_FF, failed = torch.linalg.cholesky_ex(inverse_FF)
    if failed or not penalty > 0:
        return None
    inverse_FF = torch.cholesky_inverse(inverse_FF)
    down_HF = down_HF.clone()
    gone_F = torch.zeros(gram.width, dtype=torch.bool, device=gram.device)
    to_go = gram.width - count
    while to_go:
        cost_F = down_HF.square().sum(dim=0) / inverse_FF.diagonal()
        cost_F[gone_F] = torch.inf
        out_N = torch.sort(cost_F, stable=True).indices[: min(per_round, to_go)]
        rows_NF = inverse_FF.index_select(0, out_N)
        spread_NF = torch.linalg.solve(rows_NF.index_select(1, out_N), rows_NF)
        down_HF -= down_HF.index_select(1, out_N) @ spread_NF
        inverse_FF -= rows_NF.T @ spread_NF
        gone_F[out_N] = True
        to_go -= len(out_N)
    return gone_F.logical_not().nonzero()[:, 0].cpu()


PRUNING_METHODS.register("obs", Obs())
