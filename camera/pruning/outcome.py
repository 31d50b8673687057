"""What a walk that prunes leaves besides the weights: the choice, its summary, and the statistics it was made from."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import write_tensors
from camera.files import read_json, write_json
from camera.layerwise.statistics import LayerStatistics, read_statistics
from camera.options import CaptureOptions, PruneOptions
from camera.pruning.capture import STATISTICS, write_captured
from camera.pruning.decisions import Decision
from camera.pruning.prune import KEPT, SUMMARY, Pruned, share_kept, summarize
from camera.pruning.score import SCORES, read_scores, write_scores
from camera.pruning.widths import Widths

FILES = (KEPT, SUMMARY, STATISTICS, "capture.json", SCORES, "scores.json")
"""What `Outcome.write` writes: what capture, score and prune leave, without the matrices."""


@dataclass
class Outcome:
    """The decisions of one or several walks, in channels of the source model."""

    kept: list[torch.Tensor] = field(default_factory=list)
    """int64 [K] of every layer, ascending."""
    scores: list[torch.Tensor] = field(default_factory=list)
    """CAMERA's importance in the source model, float64 [F]."""
    statistics: list[LayerStatistics] = field(default_factory=list)
    """Of the first walk, whose model has all channels."""
    cuts: list[dict[str, Any]] = field(default_factory=list)
    """The surgeries, each with its step and layer."""

    @classmethod
    def read(cls, folder: Path) -> "Outcome":
        """What `write` wrote."""
        pruned = Pruned.open(folder)
        return cls(
            pruned.kept(),
            read_scores(folder, pruned.layers),
            read_statistics(folder / STATISTICS, pruned.layers),
            read_json(folder / SUMMARY).get("cuts", []),
        )

    def add(self, decision: Decision, earlier: "Outcome | None", step: int) -> torch.Tensor:
        """Take over a layer's decision.

        Args:
            decision: of the next layer.
            earlier: the outcome of the steps before, whose kept channels are those of the decision.
            step: the step's number, from 1.

        Returns:
            The channels that stay, int64 [K], in the source model's numbers.
        """
        layer = decision.layer
        kept_K = decision.kept_K if earlier is None else earlier.kept[layer][decision.kept_K]
        self.kept.append(kept_K)
        self.scores.append(decision.scores_F if earlier is None else earlier.scores[layer])
        self.statistics.append(decision.statistics if earlier is None else earlier.statistics[layer])
        if decision.record is not None:
            self.cuts.append({"step": step, "layer": layer, **decision.record})
        return kept_K

    def write(
        self,
        folder: Path,
        source: Checkpoint,
        tokens_ST: torch.Tensor,
        capture: CaptureOptions,
        options: PruneOptions,
        widths: Widths,
    ) -> None:
        """Write `FILES`; the summary last."""
        write_tensors(
            folder / KEPT, {f"layers.{index}.kept": kept_K for index, kept_K in enumerate(self.kept)}
        )
        sequential = capture.propagate == "sequential"
        write_captured(source, tokens_ST, folder, capture, self.statistics, sequential=sequential)
        write_scores(folder, self.scores, options.reduce_ratio)
        shares = [share_kept(*layer) for layer in zip(self.scores, self.kept, strict=True)]
        cuts = {"cuts": self.cuts} if self.cuts else {}
        allocated = {} if widths.record is None else {"allocated": widths.record}
        mean = sum(widths.layers) / len(widths.layers)
        summary = summarize(source, options, shares, widths.widest, mean)
        write_json(folder / SUMMARY, {**summary, **allocated, **cuts})
