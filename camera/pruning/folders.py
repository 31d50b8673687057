"""What the stages of a prune leave in their folders for the next ones.

`statistics.safetensors` and `capture.json` (capture), `scores.safetensors` and `scores.json` (score), `kept.safetensors`
(whoever decided; with `decisions.json` where that was capture), and a file of matrices for each layer that has other weights
than a slice of the source's. What prune adds is in `camera.pruning.summary`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import read_tensors, write_tensors
from camera.devices import dtype_name, find_device, resolve_dtype
from camera.files import atomic_file, read_json, write_json
from camera.layerwise.statistics import labelled, statistics_tensors, tensor_name
from camera.options import CaptureOptions
from camera.pruning.decision import EXPERTS, Decision, Records, Routed, Stays, routed_from, routed_tensors
from camera.pruning.importance import too_few
from camera.pruning.methods import BlockRecord
from camera.pruning.plan import PrunePlan

STATISTICS, SCORES, KEPT = "statistics.safetensors", "scores.safetensors", "kept.safetensors"
DECISIONS = "decisions.json"


def write_captured(
    folder: Path,
    checkpoint: Checkpoint,
    tokens_ST: torch.Tensor,
    options: CaptureOptions,
    decisions: Sequence[Decision],
) -> None:
    """Write `statistics.safetensors` and `capture.json`."""
    tensors = statistics_tensors(
        [{block.label: block.statistics for block in decision.blocks} for decision in decisions]
    )
    routed = [decision.routed for decision in decisions]
    write_tensors(folder / STATISTICS, tensors | routed_tensors(routed))
    samples, length = tokens_ST.shape
    experts = {} if checkpoint.experts is None else {"experts": checkpoint.expert_count}
    write_json(
        folder / "capture.json",
        {
            "samples": samples,
            "length": length,
            "tokens": samples * length,
            "layers": len(decisions),
            "ffn_width": checkpoint.ffn_width,
            **experts,
            "propagate": options.propagate,
            "dtype": dtype_name(resolve_dtype(options.dtype, checkpoint.dtype)),
            "device": find_device(options.device).type,
        },
    )


@dataclass(frozen=True)
class Scored:
    """The importance of a model's channels."""

    layers: list[dict[str, torch.Tensor]]
    """Of every layer, by block: float64 [F]."""
    routed: list[Routed | None]
    """Of every layer."""
    idle: list[dict[str, int]]
    """Of every layer, the blocks that so few tokens visited that their weights alone rank them, with the tokens."""

    @classmethod
    def of(cls, decisions: Sequence[Decision]) -> "Scored":
        """What was found while the layers ran."""
        return cls(
            [{block.label: block.scores_F for block in decision.blocks} for decision in decisions],
            [decision.routed for decision in decisions],
            [too_few({block.label: block.statistics for block in decision.blocks}) for decision in decisions],
        )

    def write(self, folder: Path, reduce_ratio: float) -> None:
        """Write `scores.safetensors`, and `scores.json` with quartiles of every layer."""
        points = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
        summary = []
        for layer, (blocks, idle) in enumerate(zip(self.layers, self.idle, strict=True)):
            scores_C = torch.cat(list(blocks.values()))
            quartiles = torch.quantile(scores_C[:: max(1, len(scores_C) >> 23)], points).tolist()
            described = {"layer": layer, "sum": float(scores_C.sum()), "quartiles": quartiles}
            summary.append({**described, "ranked_by_weights": idle} if idle else described)
        tensors = {
            tensor_name(layer, label, "importance"): scores_F
            for layer, blocks in enumerate(self.layers)
            for label, scores_F in blocks.items()
        }
        write_tensors(folder / SCORES, tensors | routed_tensors(self.routed))
        write_json(folder / "scores.json", {"reduce_ratio": reduce_ratio, "layers": summary})

    @classmethod
    def read(cls, folder: Path, count: int) -> "Scored":
        """What `write` wrote, of a model of `count` layers.

        Raises:
            CameraError: if a layer is not there.
        """
        tensors = read_tensors(folder / SCORES)
        layers = labelled(tensors, "importance", count, folder / SCORES)
        idle: list[dict[str, int]] = [{}] * count
        if (folder / "scores.json").is_file():
            summary = read_json(folder / "scores.json")["layers"]
            idle = [layer.get("ranked_by_weights", {}) for layer in summary]
        return cls(layers, routed_from(tensors, count), idle)


def write_kept(folder: Path, layers: Sequence[Stays]) -> None:
    """Write `kept.safetensors`: `layers.N.kept`, int64 [K] of every block, and `layers.N.experts_kept` of sparse layers."""
    tensors = {}
    for layer, stays in enumerate(layers):
        for label, kept_K in stays.kept.items():
            tensors[tensor_name(layer, label, "kept")] = kept_K
        if stays.kept_E is not None:
            tensors[tensor_name(layer, "", EXPERTS)] = stays.kept_E
    write_tensors(folder / KEPT, tensors)


def read_kept(folder: Path, count: int) -> list[Stays]:
    """What `write_kept` wrote; no matrices.

    Raises:
        CameraError: if a layer is not there.
    """
    tensors = read_tensors(folder / KEPT)
    layers = labelled(tensors, "kept", count, folder / KEPT)
    return [Stays(kept, tensors.get(tensor_name(layer, "", EXPERTS))) for layer, kept in enumerate(layers)]


def write_decisions(folder: Path, plan: PrunePlan, records: Records) -> None:
    """Write `decisions.json`: what `kept.safetensors` was decided by, for the stages that hand it on."""
    write_json(
        folder / DECISIONS,
        {
            "method": plan.method,
            "reduce_ratio": plan.reduce_ratio,
            "sparsity": plan.sparsity,
            "kept": plan.kept,
            "experts_kept": plan.experts_kept,
            "considered": plan.considered,
            "layers": listed(records),
        },
    )


def read_records(listed: Sequence[Mapping[str, Any]], count: int) -> Records:
    """The records of `decisions.json`."""
    records: list[dict[str, BlockRecord]] = [{} for _ in range(count)]
    for each in listed:
        values = {name: value for name, value in each.items() if name not in ("layer", "block")}
        records[each["layer"]][each.get("block", "")] = BlockRecord(**values)
    return records


def listed(records: Records) -> list[dict[str, Any]]:
    """The records of all layers as one list for JSON; `read_records` is the inverse."""
    return [
        {"layer": layer, **({"block": label} if label else {}), **asdict(record)}
        for layer, blocks in enumerate(records)
        for label, record in blocks.items()
    ]


def matrices_file(layer: int | Literal["*"]) -> str:
    """Name of the file of a layer's matrices that are no slices of the source's; `*` for a pattern of all."""
    return f"layer-{layer if layer == '*' else f'{layer:04d}'}.safetensors"


def write_matrices(folder: Path, decision: Decision) -> None:
    """Write the matrices of a decision that are no slices, durably; an earlier run wrote those of a resumed one."""
    if matrices := decision.matrices:
        with atomic_file(folder / matrices_file(decision.layer)) as temporary:
            write_tensors(temporary, matrices)
