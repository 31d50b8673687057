"""The decision of a layer, and the folder that keeps those of a model.

A folder of a stage holds what was found out so far: `statistics.safetensors` and `capture.json` (capture),
`scores.safetensors` and `scores.json` (score), `kept.safetensors` (whoever decided; with `decisions.json` where that was
capture), `prune.json` (prune), and a file of matrices for each layer that has other weights than a slice of the source's.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import read_tensors, write_tensors
from camera.devices import dtype_name, resolve_device, resolve_dtype
from camera.errors import CameraError
from camera.files import atomic_file, read_json, write_json
from camera.layerwise.statistics import (
    LayerStatistics,
    statistics_from,
    statistics_tensors,
    write_statistics,
)
from camera.options import CaptureOptions, PruneOptions
from camera.pruning.methods import LayerRecord
from camera.pruning.plan import PrunePlan

STATISTICS, SCORES, KEPT = "statistics.safetensors", "scores.safetensors", "kept.safetensors"
DECISIONS, SUMMARY = "decisions.json", "prune.json"


@dataclass(frozen=True)
class Decision:
    """What is decided for one layer, and from what."""

    layer: int
    statistics: LayerStatistics
    """Of all samples of all ranks."""
    scores_F: torch.Tensor
    """CAMERA's importance, float64 [F] on the CPU."""
    kept_K: torch.Tensor
    """int64 [K] on the CPU, ascending: the channels that stay."""
    matrices: dict[str, torch.Tensor]
    """By Hugging Face name, of the kept channels: those that are no slices of the source's; none if `resumed`."""
    record: LayerRecord | None
    """How a method beyond CAMERA's decided it."""
    resumed: bool = False
    """Whether an earlier, killed run decided it, so that it was written then."""


def decision_tensors(decisions: Sequence[Decision]) -> dict[str, torch.Tensor]:
    """All but the matrices as named tensors; `decisions_from` is the inverse."""
    tensors = statistics_tensors([decision.statistics for decision in decisions])
    for decision in decisions:
        record = None if decision.record is None else asdict(decision.record)
        tensors[f"layers.{decision.layer}.importance"] = decision.scores_F
        tensors[f"layers.{decision.layer}.kept"] = decision.kept_K
        tensors[f"layers.{decision.layer}.record"] = torch.tensor(
            list(json.dumps(record).encode()), dtype=torch.uint8
        )
    return tensors


def decisions_from(tensors: dict[str, torch.Tensor], count: int, where: Path) -> list[Decision]:
    """The first `count` layers of what `decision_tensors` gave, as `resumed`.

    Raises:
        CameraError: if a layer is not there.
    """
    decisions = []
    for layer, statistics in enumerate(statistics_from(tensors, count, where)):
        record = json.loads(bytes(tensors[f"layers.{layer}.record"].tolist()))
        decisions.append(
            Decision(
                layer,
                statistics,
                tensors[f"layers.{layer}.importance"],
                tensors[f"layers.{layer}.kept"],
                {},
                None if record is None else LayerRecord(**record),
                resumed=True,
            )
        )
    return decisions


def write_captured(
    folder: Path,
    checkpoint: Checkpoint,
    tokens_ST: torch.Tensor,
    options: CaptureOptions,
    layers: Sequence[LayerStatistics],
) -> None:
    """Write `statistics.safetensors` and `capture.json`."""
    write_statistics(folder / STATISTICS, list(layers))
    samples, length = tokens_ST.shape
    write_json(
        folder / "capture.json",
        {
            "samples": samples,
            "length": length,
            "tokens": samples * length,
            "layers": len(layers),
            "ffn_width": checkpoint.ffn_width,
            "propagate": options.propagate,
            "dtype": dtype_name(resolve_dtype(options.dtype, checkpoint.dtype)),
            "device": resolve_device(options.device).type,
        },
    )


def write_scores(folder: Path, scores: Sequence[torch.Tensor], reduce_ratio: float) -> None:
    """Write the importance of every layer's channels, float64 [F], and `scores.json` with its quartiles."""
    points = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    summary = [
        {"layer": index, "sum": float(scores_F.sum()), "quartiles": torch.quantile(scores_F, points).tolist()}
        for index, scores_F in enumerate(scores)
    ]
    _write_layers(folder / SCORES, "importance", scores)
    write_json(folder / "scores.json", {"reduce_ratio": reduce_ratio, "layers": summary})


def read_scores(folder: Path, count: int) -> list[torch.Tensor]:
    """The importance in every layer, float64 [F].

    Raises:
        CameraError: if a layer is not there.
    """
    return _read_layers(folder / SCORES, "importance", count)


def write_kept(folder: Path, kept: Sequence[torch.Tensor]) -> None:
    """Write `kept.safetensors`, int64 [K] of every layer."""
    _write_layers(folder / KEPT, "kept", kept)


def write_decisions(folder: Path, plan: PrunePlan, records: Sequence[LayerRecord | None]) -> None:
    """Write `decisions.json`: what `kept.safetensors` was decided by, for the stages that hand it on."""
    written = [None if record is None else asdict(record) for record in records]
    write_json(
        folder / DECISIONS,
        {
            "method": plan.method,
            "reduce_ratio": plan.reduce_ratio,
            "sparsity": plan.sparsity,
            "layers": written,
        },
    )


def read_kept(folder: Path, count: int) -> list[torch.Tensor]:
    """The channels that stay in every layer, int64 [K], ascending.

    Raises:
        CameraError: if a layer is not there.
    """
    return _read_layers(folder / KEPT, "kept", count)


def matrices_file(layer: int) -> str:
    """Name of the file of a layer's matrices that are no slices of the source's."""
    return f"layer-{layer:04d}.safetensors"


def write_matrices(folder: Path, decision: Decision) -> None:
    """Write the matrices of a decision that are no slices, durably; an earlier run wrote those of a resumed one."""
    if decision.matrices:
        with atomic_file(folder / matrices_file(decision.layer)) as temporary:
            write_tensors(temporary, decision.matrices)


def write_summary(
    folder: Path,
    checkpoint: Checkpoint,
    plan: PrunePlan,
    options: PruneOptions,
    shares: Sequence[float],
    records: Sequence[LayerRecord | None],
) -> None:
    """Write `prune.json`.

    Args:
        folder: an existing folder.
        checkpoint: the source.
        plan, options: what was asked for.
        shares: of the importance of each layer, what stays.
        records: of each layer, where a method beyond CAMERA's decided.
    """
    beyond: dict[str, Any] = {}
    if plan.needs_gram or plan.sparsity:
        beyond = {
            "damping": plan.damping,
            "round": plan.round,
            "decisions": [
                {"layer": layer, **asdict(record)}
                for layer, record in enumerate(records)
                if record is not None
            ],
        }
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
            "removed_share": 1 - plan.kept / plan.width,
            "importance_kept_share": list(shares),
            **beyond,
        },
    )


def share_kept(scores_F: torch.Tensor, kept_K: torch.Tensor) -> float:
    """Which share of a layer's importance stays."""
    return float(scores_F[kept_K].sum() / scores_F.sum().clamp_min(torch.finfo(scores_F.dtype).tiny))


@dataclass(frozen=True)
class Pruned:
    """A folder that `prune` wrote: which channels stay, and the matrices that are no slices of the source's."""

    folder: Path
    mode: str
    layers: int
    hidden_size: int
    source_width: int
    width: int
    """FFN channels that stay."""
    sparsity: float
    """Share of the weights that stay that were asked to be zero."""

    @classmethod
    def open(cls, folder: Path) -> "Pruned":
        """Raises CameraError if the folder is not one of `prune`."""
        names = ("mode", "layers", "hidden_size", "width", "kept_width", "sparsity")
        summary = read_json(folder / SUMMARY)
        try:
            return cls(folder, *(summary[name] for name in names))
        except (KeyError, TypeError) as error:
            raise CameraError(f"{folder / SUMMARY} is not what prune writes ({error}): prune again") from None

    def check_belongs_to(self, checkpoint: Checkpoint) -> None:
        """Raise CameraError if this was not pruned from a model of the checkpoint's shape."""
        ours = (self.layers, self.hidden_size, self.source_width)
        theirs = (checkpoint.layer_count, checkpoint.hidden_size, checkpoint.ffn_width)
        if ours != theirs:
            raise CameraError(
                f"{self.folder} was pruned from a model of (layers, hidden, FFN) {ours} and {checkpoint.folder} "
                f"has {theirs}: prune this model"
            )

    def kept(self) -> list[torch.Tensor]:
        """int64 [kept] of every layer, ascending."""
        return read_kept(self.folder, self.layers)

    @property
    def removed_share(self) -> float:
        """Of all FFN channels."""
        return 1 - self.width / self.source_width

    @property
    def changed(self) -> bool:
        """Whether any matrix is another than the source's."""
        return self.width < self.source_width or self.sparsity > 0

    def matrices(self, layer: int) -> dict[str, torch.Tensor]:
        """By Hugging Face name: a layer's matrices of the kept channels that are no slices of the source's.

        Raises:
            CameraError: if the layer's file is damaged.
        """
        path = self.folder / matrices_file(layer)
        return read_tensors(path) if path.is_file() else {}


def _write_layers(path: Path, what: str, layers: Sequence[torch.Tensor]) -> None:
    write_tensors(path, {f"layers.{index}.{what}": tensor for index, tensor in enumerate(layers)})


def _read_layers(path: Path, what: str, count: int) -> list[torch.Tensor]:
    tensors = read_tensors(path)
    if len(tensors) != count:
        raise CameraError(f"{path} has {len(tensors)} layers, the model {count}: make it from this model")
    try:
        return [tensors[f"layers.{index}.{what}"] for index in range(count)]
    except KeyError as error:
        raise CameraError(f"{path} has no {error}: make it again from this model") from None
