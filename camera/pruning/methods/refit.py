"""CAMERA's choice, and a down projection refitted to the channels that stay, by least squares on the calibration tokens.

A refit must earn its place: it is fitted to one part of the calibration samples and judged on the part held back. Where it
is not better there, the block falls back to CAMERA's choice.

Source: the normal equations of ridge regression; in pruning, the weight update of Hassibi & Stork, Second Order
Derivatives for Network Pruning: Optimal Brain Surgeon, 1993, taken over all removed channels at once.
"""

import logging

import torch

from camera.devices import exact_device
from camera.layerwise.gram import Moments, Target
from camera.pruning.importance import kept_channels
from camera.pruning.methods import BlockRecord, Choice, ObservedBlock
from camera.pruning.plan import PrunePlan
from camera.registry import PRUNING_METHODS

_log = logging.getLogger(__name__)

TOKENS_PER_CHANNEL = 4
"""With fewer fitted tokens than this for every FFN channel, a block is not refitted; with a target of
a strong damping of its own, one for every channel will do."""
FACTOR_SLOWNESS = 3
"""A factorisation makes about a third of the multiplications a second that a matrix product makes."""


class Refit:
    """CAMERA's channels, refitted. Other compensating methods choose other channels."""

    name = "refit"
    needs_gram = True
    title = "CAMERA's micro-expert importance"

    def choose(
        self,
        block: ObservedBlock,
        fit_FF: torch.Tensor,
        held_FF: torch.Tensor,
        down_HF: torch.Tensor,
        plan: PrunePlan,
    ) -> torch.Tensor:
        """The channels to keep, int64 [kept] on the CPU, ascending.

        Args:
            block: what is known of it, and how many stay.
            fit_FF, held_FF: AᵀA of the fitted and of the held-back samples, float32 [F, F].
            down_HF: the down projection, float64 on the same device.
            plan: with the damping.

        Raises:
            ValueError: with the reason, if there is no choice.
        """
        return kept_channels(block.importance_F, block.kept)

    def decide(self, block: ObservedBlock, plan: PrunePlan) -> Choice:
        assert block.gram is not None
        gram, down_HF = block.gram, block.down_HF
        camera_K = kept_channels(block.importance_F, block.kept)
        tokens = gram.fit_tokens, gram.held_tokens

        def fall_back(why: str, camera: float | None = None, error: float | None = None) -> Choice:
            _log.info("%s: %s rejected, fell back to CAMERA's choice: %s", block.name, self.name, why)
            return Choice(camera_K, None, BlockRecord("camera", False, why, *tokens, camera, error))

        width = down_HF.shape[1]
        apart = gram.target is not None and gram.target.damping is not None
        least = width if apart else TOKENS_PER_CHANNEL * width
        if gram.fit_tokens < least:
            return fall_back(
                f"{gram.fit_tokens} calibration tokens to fit are fewer than {least // width} for each of the "
                f"{width} FFN channels; raise calibration.samples"
            )
        if not gram.held_tokens:
            return fall_back(
                "a single calibration sample leaves none to judge a refit; raise calibration.samples"
            )
        fit_FF, held_FF = gram.parts()
        device = exact_device(fit_FF.device)
        fit_FF, held_FF = fit_FF.to(device), held_FF.to(device)
        exact_HF = down_HF.to(device, torch.float64)
        try:
            kept_K = self.choose(block, fit_FF, held_FF, exact_HF, plan)
        except ValueError as reason:
            return fall_back(str(reason))
        fit_FH, held_FH, every_FH = _missing(gram.target, device)
        down = exact_HF, kept_K, down_HF.dtype
        camera_error = output_error(held_FF, exact_HF, camera_K, down_HF[:, camera_K], held_FH)
        tried = []
        for damping in plan.dampings:
            tried_HK = _refitted(Moments(fit_FF), *down, damping, fit_FH)
            if tried_HK is not None:
                tried.append((output_error(held_FF, exact_HF, kept_K, tried_HK, held_FH), damping))
        if not tried:
            return fall_back("its Gram matrix cannot be factored", camera_error)
        error, damping = min(tried)
        if not error < camera_error:
            return fall_back(
                f"on held-back tokens a refit loses {error:.4g} of the output's energy, and none loses "
                f"{camera_error:.4g}",
                camera_error,
                error,
            )
        # It has passed; now every token counts.
        down_HK = _refitted(Moments(fit_FF, held_FF), *down, damping, every_FH)
        if down_HK is None:
            return fall_back("its Gram matrix cannot be factored", camera_error)
        record = BlockRecord(self.name, True, None, *tokens, camera_error, error, damping=damping)
        return Choice(kept_K, down_HK, record)

    def multiplications(self, width: int, hidden: int, kept: int, dampings: int) -> int:
        removed, fits = width - kept, dampings + 1
        judging = (
            (dampings + 2) * hidden * width**2
        )  # errors on held-back tokens, and the way of the matrices to float64
        return judging + fits * (FACTOR_SLOWNESS * kept**3 // 3 + kept**2 * hidden + kept * removed * hidden)


def refit(
    gram: Moments,
    down_HF: torch.Tensor,
    kept_K: torch.Tensor,
    damping: float,
    missing_FH: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """W' = argmin ‖R + A Wᵀ − A_S W'ᵀ‖² + λ‖W' − W_S‖², λ = `damping` · mean(diag AᵀA).

    Args:
        gram: AᵀA of the activations A [tokens, F], symmetric.
        down_HF: W, the down projection [hidden, F], float64 on the same device.
        kept_K: int64 [K], the channels S that stay.
        damping: above 0; the larger, the nearer to W_S.
        missing_FH: AᵀR of what the layer's output lacks, R [tokens, hidden]; 0 if none is given.

    Returns:
        W', float64 [hidden, K]; None where the equations cannot be solved, because values are not finite or all zero.
    """
    kept_K = kept_K.to(gram.device)
    gone_F = torch.ones(gram.width, dtype=torch.bool, device=gram.device)
    gone_F[kept_K] = False
    gone_R = gone_F.nonzero()[:, 0]
    penalty = damping * gram.mean()
    lower_KK, failed = _factor(gram.select(kept_K, kept_K), penalty)
    if failed or not penalty > 0:
        return None
    # W' − W_S: as much of what the removed channels put out as the kept ones can.
    missing_KH = gram.select(kept_K, gone_R) @ down_HF.index_select(1, gone_R).T
    if missing_FH is not None:
        missing_KH += missing_FH.index_select(0, kept_K)
    return down_HF.index_select(1, kept_K) + torch.cholesky_solve(missing_KH, lower_KK).T


def _factor(system_KK: torch.Tensor, penalty: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The Cholesky factor of a system that is not needed again, with a penalty added to its diagonal; and whether that failed."""
    system_KK.diagonal().add_(penalty)
    lower_KK, failed = torch.linalg.cholesky_ex(system_KK)
    return lower_KK, failed


Missing = tuple[torch.Tensor, float]
"""AᵀR [F, hidden] of what a layer lacks, R [tokens, hidden], and a number that goes with it: ‖R‖², or a damping."""
ToFit = tuple[torch.Tensor, float | None]
"""The same with a damping, or None where R is fitted together with the rest."""


def fit_missing(
    gram: Moments,
    down_HF: torch.Tensor,
    kept_K: torch.Tensor,
    new_HK: torch.Tensor,
    missing: Missing,
) -> torch.Tensor | None:
    """W' + argmin_D ‖R + A Wᵀ − A_S (W' + D)ᵀ‖² + λ‖D‖²: the block also makes good what its layer lacks.

    Args:
        gram: AᵀA of the activations A [tokens, F], symmetric.
        down_HF: W, the down projection [hidden, F], float64.
        kept_K: int64 [K], the channels S that stay.
        new_HK: W' [hidden, K], float64.
        missing: AᵀR and λ.

    Returns:
        float64 [hidden, K]; None where the equations cannot be solved.
    """
    kept_K = kept_K.to(gram.device)
    system_KK = gram.select(kept_K, kept_K)
    every_F = torch.arange(gram.width, device=gram.device)
    wanted_KH = missing[0].index_select(0, kept_K).double() + gram.select(kept_K, every_F) @ down_HF.T
    wanted_KH -= system_KK @ new_HK.T
    lower_KK, failed = _factor(system_KK, missing[1])
    return None if failed else new_HK + torch.cholesky_solve(wanted_KH, lower_KK).T


def output_error(
    gram_FF: torch.Tensor,
    down_HF: torch.Tensor,
    kept_K: torch.Tensor,
    new_HK: torch.Tensor,
    missing: Missing | None = None,
) -> float:
    """‖R + A Wᵀ − A_S W'ᵀ‖² / ‖R + A Wᵀ‖² from the Gram matrix of A; 0 where the first is. R is 0 if none is given.

    Args:
        gram_FF: AᵀA, floating dtype.
        down_HF: W [hidden, F].
        kept_K: int64 [K], S.
        new_HK: W' [hidden, K].
        missing: AᵀR and ‖R‖².
    """
    whole_HF = down_HF.to(gram_FF.dtype, copy=True)
    lost_HF = whole_HF.clone()
    lost_HF[:, kept_K.to(lost_HF.device)] -= new_HK.to(lost_HF)
    error, whole = _energy(gram_FF, lost_HF), _energy(gram_FF, whole_HF)
    if missing is not None:
        missing_HF, energy = missing[0].T.to(gram_FF.dtype), missing[1]
        error += energy + 2 * float((lost_HF * missing_HF).sum())
        whole += energy + 2 * float((whole_HF * missing_HF).sum())
    return error / whole if error else 0.0


def _energy(gram_FF: torch.Tensor, matrix_HF: torch.Tensor) -> float:
    """‖A Mᵀ‖² = tr(M AᵀA Mᵀ)."""
    return float(((matrix_HF @ gram_FF) * matrix_HF).sum())


def _missing(
    target: Target | None, device: torch.device
) -> tuple[ToFit | None, Missing | None, ToFit | None]:
    """What is missing: to fit, to judge, and of all samples to fit in the end."""
    if target is None:
        return None, None, None
    fit_FH, held_FH = target.fit_FH.to(device), target.held_FH.to(device)
    energy, damping = float(target.held_energy), target.damping
    return (fit_FH, damping), (held_FH, energy), (fit_FH + held_FH, damping)


def _refitted(
    gram: Moments,
    down_HF: torch.Tensor,
    kept_K: torch.Tensor,
    dtype: torch.dtype,
    damping: float,
    missing: ToFit | None,
) -> torch.Tensor | None:
    """A refit as it would be saved, on the CPU; None where it cannot be."""
    if missing is None or missing[1] is None:
        new_HK = refit(gram, down_HF, kept_K, damping, None if missing is None else missing[0])
    else:
        new_HK = refit(gram, down_HF, kept_K, damping)
        if new_HK is not None:
            new_HK = fit_missing(gram, down_HF, kept_K, new_HK, (missing[0], missing[1]))
    saved_HK = None if new_HK is None else new_HK.to(dtype).cpu().contiguous()
    return saved_HK if saved_HK is not None and bool(saved_HK.isfinite().all()) else None


PRUNING_METHODS.register("refit", Refit())
