"""Scores of FFN channels that other methods use, to hold CAMERA's importance against. Pure functions.

Each takes what one decoder layer shows on the calibration tokens and gives one score per channel, float64 [F]; channels
of the highest scores stay. All see the same tokens and keep the same number of channels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Layer:
    """One decoder layer's feed-forward matrices, and its activations on the calibration tokens."""

    index: int
    gate_FH: torch.Tensor
    up_FH: torch.Tensor
    down_HF: torch.Tensor
    act_TF: torch.Tensor
    """What enters the down projection."""


Score = Callable[[Layer, int], torch.Tensor]
"""From a layer and the calibration's seed to float64 [F]."""


def random_scores(layer: Layer, seed: int) -> torch.Tensor:
    """Uniform noise: what choosing well is worth."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + layer.index)
    return torch.rand(layer.down_HF.shape[1], generator=generator, dtype=torch.float64)


def weight_norm(layer: Layer, seed: int) -> torch.Tensor:
    """The norm of all of a channel's weights, ‖(g_c, u_c, w_c)‖₂: no calibration."""
    gate_F = layer.gate_FH.double().square().sum(1)
    up_F = layer.up_FH.double().square().sum(1)
    return (gate_F + up_F + layer.down_HF.double().square().sum(0)).sqrt()


def wanda_sp(layer: Layer, seed: int) -> torch.Tensor:
    """Wanda's |W_hc|·‖a_c‖₂ averaged over a column of the down projection, as FLAP (AAAI 2024) defines Wanda-sp."""
    norm_F = layer.act_TF.double().square().sum(0).sqrt()
    return layer.down_HF.double().abs().mean(0) * norm_F


def flap(layer: Layer, seed: int) -> torch.Tensor:
    """FLAP's WIFV: the variance of a channel's activation times ‖w_c‖₂² (AAAI 2024, section 3).

    The metric alone. FLAP then adds a bias in the removed channels' stead; these models have none, and the size would
    no longer be the same.
    """
    return layer.act_TF.double().var(0) * layer.down_HF.double().square().sum(0)
