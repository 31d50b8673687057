"""The methods that are compared. Ours go through `prune_checkpoint`, as a user's pruning does; the others are scored here.

All keep the same number of channels in every layer, see the same calibration tokens, and propagate alike. A score takes
what one decoder layer shows on these tokens and gives float64 [F]; channels of the highest scores stay.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from camera.checkpoints.checkpoint import Checkpoint
from camera.files import read_json
from camera.layerwise.runner import LayerRunner
from camera.options import CaptureOptions, PruneOptions
from camera.pruning.importance import kept_channels
from camera.pruning.plan import kept_width
from camera.pruning.prune_checkpoint import prune_checkpoint
from camera.pruning.summary import SUMMARY

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BASELINE = "camera 0.95"
"""CAMERA-P as it is published: what the others are measured by."""
_BATCH = 16


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


@dataclass(frozen=True)
class Method:
    """One way to choose channels and weights: by a score of its own, or by the tool with some options."""

    score: Score | None = None
    options: dict[str, Any] = field(default_factory=dict)
    seeded: bool = True
    """Whether another calibration seed gives another result."""

    @property
    def refits(self) -> bool:
        """Whether it changes the weights that stay."""
        return "method" in self.options


METHODS: dict[str, Method] = {
    "random": Method(random_scores),
    "weight norm": Method(weight_norm, seeded=False),
    "wanda-sp": Method(wanda_sp),
    "flap": Method(flap),
    "camera 0": Method(options={"reduce_ratio": 0.0}),
    BASELINE: Method(options={"reduce_ratio": 0.95}),
    "camera 1": Method(options={"reduce_ratio": 1.0}),
    "refit": Method(options={"method": "refit"}),
    "refit layer": Method(options={"method": "refit", "target": "layer"}),
    "obs": Method(options={"method": "obs"}),
}


def pruned(
    checkpoint: Checkpoint, tokens_ST: torch.Tensor, method: Method, prune: PruneOptions, seed: int, mode: str
) -> tuple["PreTrainedModel", int]:
    """The pruned model in memory, in float32, and how often the tool refused to cut a layer as asked for.

    Args:
        checkpoint: the dense model.
        tokens_ST: int64 [samples, tokens] of calibration text.
        method: how to choose.
        prune: ratio and rounding; the method's own options go over it.
        seed: of the random method.
        mode: `one-shot` or `sequential`.
    """
    if method.score is not None:
        keep = kept_width(checkpoint.ffn_width, prune.ratio, prune.multiple_of)
        score = method.score
        return prune_by(
            checkpoint, tokens_ST, lambda layer: score(layer, seed), keep, mode == "sequential"
        ), 0
    options = PruneOptions.model_validate({**prune.model_dump(), **method.options})
    capture = CaptureOptions.model_validate(
        {"propagate": mode, "batch_size": _BATCH, "dtype": "float32", "device": "cpu"}
    )
    refused: list[dict[str, Any]] = []

    def note(_: Path, decided: Path) -> None:
        decisions = read_json(decided / SUMMARY).get("decisions", [])
        refused.extend(decision for decision in decisions if decision["fallback"])

    with tempfile.TemporaryDirectory(prefix="camera-quality-") as scratch:
        out = Path(scratch) / "pruned"
        prune_checkpoint(checkpoint, tokens_ST, out, capture, options, finish=note)
        return Checkpoint.open(out).load_model(torch.float32), len(refused)


def prune_by(
    checkpoint: Checkpoint,
    tokens_ST: torch.Tensor,
    score: Callable[[Layer], torch.Tensor],
    keep: int,
    sequential: bool,
) -> "PreTrainedModel":
    """Slice every layer to its `keep` channels of highest score, in memory.

    Args:
        checkpoint: the dense model.
        tokens_ST: int64 [samples, tokens].
        score: from a layer to [F].
        keep: channels that stay.
        sequential: whether a layer sees what the pruned layers below it put out.
    """
    model = checkpoint.load_model(torch.float32)
    walk = LayerRunner(checkpoint, torch.device("cpu"), torch.float32)
    call = walk.caller(tokens_ST.shape[1])
    with torch.no_grad():  # no inference mode: its tensors would be the model's weights
        hidden_STH = walk.embed(tokens_ST)
        for index in range(checkpoint.layer_count):
            with walk.layer(index) as module:
                mlp: Any = module.mlp
                acts: list[torch.Tensor] = []
                hook = mlp.down_proj.register_forward_pre_hook(
                    lambda _, given, acts=acts: acts.append(given[0])
                )
                hidden_STH = torch.cat([call(module, batch) for batch in hidden_STH.split(_BATCH)])
                hook.remove()
                act_STF = torch.cat(acts)
                down_HF = mlp.down_proj.weight
                layer = Layer(index, mlp.gate_proj.weight, mlp.up_proj.weight, down_HF, act_STF.flatten(0, 1))
                kept_K = kept_channels(score(layer), keep)
                if sequential:
                    gone_F = torch.ones(down_HF.shape[1], dtype=torch.bool)
                    gone_F[kept_K] = False
                    hidden_STH -= act_STF[..., gone_F] @ down_HF[:, gone_F].T
            _narrow(model.get_decoder().layers[index].mlp, kept_K)
    return model


def _narrow(mlp: Any, kept_K: torch.Tensor) -> None:
    for linear, dim in ((mlp.gate_proj, 0), (mlp.up_proj, 0), (mlp.down_proj, 1)):
        linear.weight = nn.Parameter(linear.weight.detach().index_select(dim, kept_K), requires_grad=False)
