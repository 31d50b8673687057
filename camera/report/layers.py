"""What is known of each decoder layer, small enough to draw: importance, which channels stay, and what that cost."""

from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.files import read_json
from camera.layerwise.statistics import Labelled
from camera.pruning.folders import Scored
from camera.pruning.summary import SUMMARY, Pruned
from camera.report.schema import LayerDamage, LayerExperts, LayerImportance

CURVE_POINTS = 64
BINS = 256


def layer_importance(scored: Path, pruned: Path | None, count: int) -> tuple[LayerImportance, ...]:
    """Quantiles and sorted curve of each layer's importance, and which channels stay.

    Args:
        scored: what `score` wrote.
        pruned: what `prune` wrote, if anything was pruned.
        count: of decoder layers.
    """
    layers = Scored.read(scored, count).layers
    scores = [torch.cat(list(blocks.values())) for blocks in layers]
    kept: list[torch.Tensor] | list[None] = [None] * count
    shares: list[Any] = [None] * count
    if pruned is not None:
        shares = read_json(pruned / SUMMARY)["importance_kept_share"]
        kept = [
            _of_layer(blocks, stays.kept)
            for blocks, stays in zip(layers, Pruned.open(pruned).stays(), strict=True)
        ]
    return tuple(
        LayerImportance(
            layer=layer,
            quartiles=tuple(float(value) for value in np.quantile(scores_F.numpy(), (0, 0.25, 0.5, 0.75, 1))),
            curve=_curve(scores_F.numpy()),
            kept_importance=share,
            kept_bins=() if kept_K is None else _bins(len(scores_F), kept_K.numpy()),
        )
        for layer, (scores_F, kept_K, share) in enumerate(zip(scores, kept, shares, strict=True))
    )


def _of_layer(scores: Labelled[torch.Tensor], kept: Labelled[torch.Tensor]) -> torch.Tensor:
    """The channels that stay, counted through all blocks of a layer."""
    found, start = [], 0
    for label, scores_F in scores.items():
        if label in kept:
            found.append(kept[label] + start)
        start += len(scores_F)
    return torch.cat(found)


def layer_experts(scored: Path, pruned: Path | None, source: Checkpoint) -> tuple[LayerExperts, ...]:
    """What the routers of a mixture of experts did, and what of each expert stays; none of a dense model.

    Args:
        scored: what `score` wrote.
        pruned: what `prune` wrote, if anything was pruned.
        source: the model before.
    """
    found = Scored.read(scored, source.layer_count)
    stays = None if pruned is None else Pruned.open(pruned).stays()
    layers = []
    for layer, routed in enumerate(found.routed):
        if routed is None:
            continue
        labels = [block.label for block in source.blocks(layer) if block.expert is not None]
        kept = {} if stays is None else stays[layer].kept
        energy_E = routed.energy_E / routed.energy_E.sum().clamp_min(torch.finfo(torch.float64).tiny)
        layers.append(
            LayerExperts(
                layer=layer,
                tokens=tuple(routed.tokens_E.tolist()),
                energy=tuple(float(f"{share:.5g}") for share in energy_E.tolist()),
                kept=() if stays is None else tuple(len(kept.get(label, ())) for label in labels),
                ranked_by_weights=found.idle[layer],
            )
        )
    return tuple(layers)


def layer_damage(pruned: Path) -> tuple[LayerDamage, ...]:
    """What pruning cost the output of every layer, as far as `prune.json` records it; the median over its networks.

    Args:
        pruned: what `prune` wrote.
    """
    by_layer: dict[int, list[tuple[float, float, bool]]] = {}
    for decision in read_json(pruned / SUMMARY).get("decisions", []):
        plain, tried = decision["error_camera"], decision["error"]
        if plain is not None:
            kept = plain if decision["fallback"] or tried is None else tried
            by_layer.setdefault(decision["layer"], []).append((plain, kept, decision["refitted"]))
    return tuple(
        LayerDamage(
            layer=layer,
            plain=median(plain for plain, _, _ in found),
            kept=median(kept for _, kept, _ in found),
            refitted=any(refitted for _, _, refitted in found),
        )
        for layer, found in by_layer.items()
    )


def _curve(scores_F: np.ndarray[Any, Any]) -> tuple[float, ...]:
    ranks = np.linspace(0, len(scores_F) - 1, min(CURVE_POINTS, len(scores_F))).round().astype(int)
    # Five digits draw any curve, and keep results.json small.
    return tuple(float(f"{value:.5g}") for value in np.sort(scores_F)[::-1][ranks])


def _bins(width: int, kept_K: np.ndarray[Any, Any]) -> tuple[float, ...]:
    mask_F = np.zeros(width)
    mask_F[kept_K] = 1
    return tuple(round(float(part.mean()), 3) for part in np.array_split(mask_F, min(BINS, width)))
