"""The cut of one layer from its Gram matrix: which channels stay, and a down projection refitted to them.

A refit must earn its place: it is fitted to one part of the calibration samples and judged on the part held back, and
where it is not better there the layer is cut as plain CAMERA cuts it, and says so.
"""

import logging
from dataclasses import dataclass
from typing import Literal

import torch

from camera.options import PruneOptions
from camera.pruning.gram import LayerGram
from camera.pruning.importance import importance, kept_channels
from camera.pruning.obs import obs_channels
from camera.pruning.refit import output_error, refit
from camera.pruning.statistics import LayerStatistics

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


def surgery_of(width: int, kept: int, options: PruneOptions) -> Surgery | None:
    """The surgery that options ask for on layers of `width` channels; None where plain CAMERA is all there is to do."""
    if kept == width or (options.score == "energy" and not options.refit):
        return None
    per_round = options.round or max(1, width // _ROUNDS)
    return Surgery(kept, options.reduce_ratio, options.score, options.refit, options.damping, per_round)


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


@dataclass(frozen=True)
class Cut:
    """One layer's decision."""

    kept_K: torch.Tensor
    """int64 [K] on the CPU, ascending."""
    down_HK: torch.Tensor | None
    """The down projection of the kept channels in the checkpoint's dtype, on the CPU; None where it is a slice."""
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
        log.warning("layer %d is pruned plainly, by energy and without a refit: %s", index, why)
        return Cut(energy_K, None, CutRecord("energy", False, why, *tokens, plain, error))

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
        return Cut(kept_K, None, CutRecord(surgery.score, False, None, *tokens, plain, error))
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
    assert down_HK is not None, "more tokens make the equations better conditioned"
    return Cut(kept_K, down_HK, CutRecord(surgery.score, True, None, *tokens, plain, error))


def _refitted(
    gram_FF: torch.Tensor, down_HF: torch.Tensor, kept_K: torch.Tensor, damping: float, dtype: torch.dtype
) -> torch.Tensor | None:
    """A refit as it would be saved, on the CPU; None where it cannot be."""
    new_HK = refit(gram_FF, down_HF, kept_K, damping)
    saved_HK = None if new_HK is None else new_HK.to(dtype).cpu()
    return saved_HK if saved_HK is not None and bool(saved_HK.isfinite().all()) else None


def exact_device(device: torch.device) -> torch.device:
    """Where float64 is: an NPU has none."""
    return device if device.type in ("cpu", "cuda") else torch.device("cpu")
