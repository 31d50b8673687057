"""`prune.json`: what was pruned, how, and what stays; and the folder that holds it, as later stages open it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import read_tensors
from camera.errors import CameraError
from camera.files import read_json, write_json
from camera.layerwise.statistics import Labelled
from camera.options import PruneOptions
from camera.pruning.decision import Records, Stays
from camera.pruning.folders import Scored, listed, matrices_file, read_kept
from camera.pruning.plan import PrunePlan

SUMMARY = "prune.json"


def write_summary(
    folder: Path,
    checkpoint: Checkpoint,
    plan: PrunePlan,
    options: PruneOptions,
    scored: Scored,
    decided: tuple[Sequence[Stays], Records],
) -> None:
    """Write `prune.json`.

    Args:
        folder: an existing folder.
        checkpoint: the source.
        plan, options: what was asked for.
        scored: the importance that it was decided from.
        decided: what stays of every layer, and the records of a method beyond CAMERA's.
    """
    layers, records = decided
    beyond: dict[str, Any] = {}
    if plan.needs_gram or plan.sparsity:
        beyond = {
            "dampings": list(plan.dampings),
            "target": plan.target,
            "round": plan.round,
            "decisions": listed(records),
        }
    experts: dict[str, Any] = {}
    if plan.experts:
        idle = {str(layer): found for layer, found in enumerate(scored.idle) if found}
        experts = {
            "scope": plan.scope,
            "experts": plan.experts,
            "experts_kept": plan.experts_kept,
            "ranked_by_weights": idle,
        }
    if plan.considered:
        experts["considered"] = [split._asdict() for split in plan.considered]
    write_json(
        folder / SUMMARY,
        {
            "mode": plan.mode,
            "ratio": options.ratio,
            "multiple_of": options.multiple_of,
            "method": plan.method,
            "sparsity": plan.sparsity,
            "layers": checkpoint.layer_count,
            "hidden_size": checkpoint.hidden_size,
            "width": plan.width,
            "kept_width": plan.kept,
            **experts,
            "config": plan.config_changes(checkpoint) if plan.mode == "physical" else {},
            "removed_share": plan.removed_share,
            "importance_kept_share": [
                share_kept(scores, stays) for scores, stays in zip(scored.layers, layers, strict=True)
            ],
            **beyond,
        },
    )


def complaints(summary: Mapping[str, Any]) -> list[str]:
    """What `prune.json` holds that a person should know: methods that were rejected, experts without tokens."""
    lines = []
    by_layer: dict[int, list[Mapping[str, Any]]] = {}
    for one in summary.get("decisions", []):
        by_layer.setdefault(one["layer"], []).append(one)
    for layer, decided in by_layer.items():
        if not (fallen := [one for one in decided if one["fallback"]]):
            continue
        first, rejected = fallen[0], f"{summary['method']} rejected"
        if len(decided) == 1:
            lines.append(f"layer {layer}: {rejected}, fell back to CAMERA: {first['fallback']}")
        else:
            lines.append(
                f"layer {layer}: {rejected} in {len(fallen)} of {len(decided)} networks, which fell back to CAMERA; "
                f"{first['block']}: {first['fallback']}"
            )
    for layer, idle in summary.get("ranked_by_weights", {}).items():
        names = ", ".join(f"{label} ({tokens} tokens)" for label, tokens in idle.items())
        lines.append(f"layer {layer}: too few tokens, ranked by their weights alone: {names}")
    return lines


def share_kept(scores: Labelled[torch.Tensor], stays: Stays) -> float:
    """Which share of a layer's importance stays."""
    total = sum(float(scores_F.sum()) for scores_F in scores.values())
    kept = sum(float(scores[label][kept_K].sum()) for label, kept_K in stays.kept.items())
    return kept / max(total, torch.finfo(torch.float64).tiny)


@dataclass(frozen=True)
class Pruned:
    """A folder that `prune` wrote: which channels stay, and the matrices that are no slices of the source's."""

    folder: Path
    mode: str
    layers: int
    hidden_size: int
    source_width: int
    width: int
    """FFN channels that stay, of a mixture of experts those of each expert."""
    sparsity: float
    """Share of the weights that stay that were asked to be zero."""
    config_changes: dict[str, Any]
    """Keys of config.json that have other values in the pruned model."""
    removed_share: float
    """Of all FFN channels; of a mixture of experts those of the experts that are routed to."""
    experts: int = 0
    """Of each sparse layer of the source."""
    experts_kept: int = 0

    @classmethod
    def open(cls, folder: Path) -> "Pruned":
        """Raises CameraError if the folder is not one of `prune`."""
        names = (
            "mode",
            "layers",
            "hidden_size",
            "width",
            "kept_width",
            "sparsity",
            "config",
            "removed_share",
        )
        summary = read_json(folder / SUMMARY)
        try:
            values = [summary[name] for name in names]
            experts = {name: summary.get(name, 0) for name in ("experts", "experts_kept")}
            return cls(folder, *values, **experts)
        except (KeyError, TypeError, AttributeError) as error:
            raise CameraError(f"{folder / SUMMARY} is not what prune writes ({error}): prune again") from None

    def check_belongs_to(self, checkpoint: Checkpoint) -> None:
        """Raise CameraError if this was not pruned from a model of the checkpoint's shape."""
        ours = (self.layers, self.hidden_size, self.source_width)
        theirs = (checkpoint.layer_count, checkpoint.hidden_size, checkpoint.ffn_width)
        if ours != theirs or self.experts != checkpoint.expert_count:
            raise CameraError(
                f"{self.folder} was pruned from a model of (layers, hidden, FFN) {ours} and {checkpoint.folder} "
                f"has {theirs}: prune this model"
            )

    def stays(self) -> list[Stays]:
        """What stays of every layer; no matrices."""
        return read_kept(self.folder, self.layers)

    @property
    def changed(self) -> bool:
        """Whether any matrix is another than the source's."""
        return self.removed_share > 0 or self.sparsity > 0

    def matrices(self, layer: int) -> dict[str, torch.Tensor]:
        """By Hugging Face name: a layer's matrices of the kept channels that are no slices of the source's.

        Raises:
            CameraError: if the layer's file is damaged.
        """
        path = self.folder / matrices_file(layer)
        return read_tensors(path) if path.is_file() else {}
