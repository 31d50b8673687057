"""The cut of one layer from its Gram matrix: which channels stay, and a down projection refitted to them.

A refit must earn its place: it is fitted to one part of the calibration samples and judged on the part held back, and
where it is not better there the layer is cut as plain CAMERA cuts it, and says so.
"""

import logging
from dataclasses import dataclass, replace
from typing import Literal

import torch

from camera.layerwise.feed_forward import ROLES
from camera.layerwise.gram import LayerGram
from camera.layerwise.statistics import LayerStatistics
from camera.options import PruneOptions, SparsityPattern
from camera.pruning.importance import importance, kept_channels
from camera.pruning.obs import obs_channels
from camera.pruning.refit import output_error, refit
from camera.pruning.wanda import sparsified, zero_share

log = logging.getLogger(__name__)

TOKENS_PER_CHANNEL = 4
"""Fewer fitted tokens than this for every FFN channel, and a layer is not refitted."""

_ROUNDS = 64
"""OBS removes a share of 1 / 64 of the channels in a round, unless told otherwise."""


@dataclass(frozen=True)
class Surgery:
    """How layers are cut where more is wanted than CAMERA's choice of channels. Part of a walk's identity."""

    kept: int
    reduce_ratio: float
    score: Literal["energy", "obs"]
    refit: bool
    damping: float
    per_round: int
    sparsity: float = 0.0
    pattern: SparsityPattern = "unstructured"
    widths: tuple[int, ...] = ()
    """What each layer keeps, where that is not `kept` for all."""

    def of_layer(self, layer: int) -> "Surgery":
        """The same for one layer."""
        return replace(self, kept=self.widths[layer], widths=()) if self.widths else self

    @property
    def needs_gram(self) -> bool:
        """Whether the statistics of single channels are not enough."""
        return self.refit or self.score == "obs"


def surgery_of(width: int, kept: int, options: PruneOptions, widths: tuple[int, ...] = ()) -> Surgery | None:
    """The surgery that options ask for on layers of `width` channels; None where plain CAMERA is all there is to do."""
    cuts = min(widths, default=kept) < width
    surgery = Surgery(
        kept,
        options.reduce_ratio,
        options.score if cuts else "energy",
        options.refit and cuts,
        options.damping,
        options.round or max(1, width // _ROUNDS),
        options.sparsity,
        options.sparsity_pattern,
        widths,
    )
    return surgery if surgery.needs_gram or surgery.sparsity else None


@dataclass(frozen=True)
class CutRecord:
    """What was decided for a layer and why, for `prune.json`."""

    score: str
    """What chose the channels in the end: `energy` or `obs`."""
    refitted: bool
    refused: str | None
    """Why a refit or a choice by OBS that was asked for did not happen; None where it did."""
    fit_tokens: int
    held_tokens: int
    error_plain: float | None
    """Of plain CAMERA's cut: share of the FFN output's energy lost on held-back tokens. None where nothing was."""
    error: float | None
    """The same of the cut that was tried."""
    zero_shares: dict[str, float] | None = None
    """Of the gate, up and down weights that stay, after sparsity was asked for: which share is zero."""


@dataclass(frozen=True)
class Cut:
    """One layer's decision."""

    kept_K: torch.Tensor
    """int64 [K] on the CPU, ascending."""
    matrices: dict[str, torch.Tensor]
    """Those of `gate` [K, hidden], `up` [K, hidden] and `down` [hidden, K] that are no slices of the layer's own, in the
    checkpoint's dtype, on the CPU."""
    record: CutRecord


def cut_layer(
    index: int, statistics: LayerStatistics, gram: LayerGram, down_HF: torch.Tensor, surgery: Surgery
) -> Cut:
    """Decide which channels of a layer stay and what its down projection becomes.

    Args:
        index: the decoder layer, for messages.
        statistics: of all samples.
        gram: of all samples.
        down_HF: the down projection [hidden, F] in the checkpoint's dtype, on the CPU.
        surgery: what is asked for.
    """
    energy_K = kept_channels(importance(statistics, down_HF, surgery.reduce_ratio), surgery.kept)
    tokens = gram.fit_tokens, gram.held_tokens

    def plainly(why: str, plain: float | None = None, error: float | None = None) -> Cut:
        log.info("layer %d is pruned plainly, by energy and without a refit: %s", index, why)
        return Cut(energy_K, {}, CutRecord("energy", False, why, *tokens, plain, error))

    width = down_HF.shape[1]
    if gram.fit_tokens < TOKENS_PER_CHANNEL * width:
        return plainly(
            f"{gram.fit_tokens} calibration tokens to fit are fewer than {TOKENS_PER_CHANNEL} for each of the {width} "
            "FFN channels; raise calibration.samples"
        )
    if not gram.held_tokens:
        return plainly("a single calibration sample leaves none to check a refit; raise calibration.samples")
    fit_FF, held_FF = gram.parts()
    device = exact_device(fit_FF.device)
    fit_FF, held_FF = fit_FF.to(device), held_FF.to(device)
    exact_HF = down_HF.to(device, torch.float64)
    kept_K: torch.Tensor | None = energy_K
    if surgery.score == "obs":
        kept_K = obs_channels(
            fit_FF.double() + held_FF, exact_HF, surgery.kept, surgery.damping, surgery.per_round
        )
    if kept_K is None:
        return plainly("its Gram matrix cannot be inverted")
    plain = output_error(held_FF, exact_HF, energy_K, down_HF[:, energy_K])
    if not surgery.refit:
        error = output_error(held_FF, exact_HF, kept_K, down_HF[:, kept_K])
        return Cut(kept_K, {}, CutRecord(surgery.score, False, None, *tokens, plain, error))
    tried_HK = _refitted(fit_FF.double(), exact_HF, kept_K, surgery.damping, down_HF.dtype)
    if tried_HK is None:
        return plainly("its Gram matrix cannot be factored", plain)
    error = output_error(held_FF, exact_HF, kept_K, tried_HK)
    if not error < plain:
        return plainly(
            f"on held-back tokens a refit loses {error:.4g} of the output's energy, and none loses {plain:.4g}",
            plain,
            error,
        )
    # It has passed; now every token counts.
    down_HK = _refitted(fit_FF.double() + held_FF, exact_HF, kept_K, surgery.damping, down_HF.dtype)
    if down_HK is None:
        return plainly("its Gram matrix cannot be factored", plain)
    return Cut(kept_K, {"down": down_HK}, CutRecord(surgery.score, True, None, *tokens, plain, error))


def cut_plainly(statistics: LayerStatistics, down_HF: torch.Tensor, surgery: Surgery) -> Cut:
    """CAMERA's cut, for a surgery that needs no Gram matrix."""
    kept_K = kept_channels(importance(statistics, down_HF, surgery.reduce_ratio), surgery.kept)
    return Cut(kept_K, {}, CutRecord("energy", False, None, 0, 0, None, None))


def make_sparse(
    cut: Cut,
    statistics: LayerStatistics,
    input_squares_H: torch.Tensor,
    matrices: dict[str, torch.Tensor],
    surgery: Surgery,
) -> Cut:
    """Set the least weights of a cut to zero.

    Args:
        cut: the channels, and a refitted down projection if there is one.
        statistics: of what enters the down projection.
        input_squares_H: Σ x² of what enters gate and up, [hidden].
        matrices: the layer's own `gate`, `up` and `down`, on the CPU.
        surgery: how sparse.
    """
    squares_K = statistics.sum_squares_F[cut.kept_K]
    sparse = {}
    for role in ROLES:
        inputs = squares_K if role == "down" else input_squares_H
        own = matrices[role].index_select(1 if role == "down" else 0, cut.kept_K)
        sparse[role] = sparsified(cut.matrices.get(role, own), inputs, surgery.sparsity, surgery.pattern)
    shares = {role: zero_share(matrix) for role, matrix in sparse.items()}
    return Cut(cut.kept_K, sparse, replace(cut.record, zero_shares=shares))


def _refitted(
    gram_FF: torch.Tensor, down_HF: torch.Tensor, kept_K: torch.Tensor, damping: float, dtype: torch.dtype
) -> torch.Tensor | None:
    """A refit as it would be saved, on the CPU; None where it cannot be."""
    new_HK = refit(gram_FF, down_HF, kept_K, damping)
    saved_HK = None if new_HK is None else new_HK.to(dtype).cpu().contiguous()
    return saved_HK if saved_HK is not None and bool(saved_HK.isfinite().all()) else None


def exact_device(device: torch.device) -> torch.device:
    """Where float64 is: an NPU has none."""
    return device if device.type in ("cpu", "cuda") else torch.device("cpu")
