"""The decision of a layer, and the folder that keeps those of a model.

A folder of a stage holds what was found out so far: `statistics.safetensors` and `capture.json` (capture),
`scores.safetensors` and `scores.json` (score), `kept.safetensors` (whoever decided; with `decisions.json` where that was
capture), `prune.json` (prune), and a file of matrices for each layer that has other weights than a slice of the source's.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import read_tensors, write_tensors
from camera.devices import dtype_name, resolve_device, resolve_dtype
from camera.errors import CameraError
from camera.files import atomic_file, read_json, write_json
from camera.layerwise.statistics import (
    BlockStatistics,
    Labelled,
    labelled,
    statistics_from,
    statistics_tensors,
    tensor_name,
)
from camera.options import CaptureOptions, PruneOptions
from camera.pruning.importance import too_few
from camera.pruning.methods import BlockRecord
from camera.pruning.plan import PrunePlan

STATISTICS, SCORES, KEPT = "statistics.safetensors", "scores.safetensors", "kept.safetensors"
DECISIONS, SUMMARY = "decisions.json", "prune.json"
_EXPERTS = "experts_kept"


@dataclass(frozen=True)
class BlockDecision:
    """What is decided for one feed-forward network, and from what."""

    label: str
    """Of the block."""
    statistics: BlockStatistics
    """Of all samples of all ranks."""
    scores_F: torch.Tensor
    """CAMERA's importance, float64 [F] on the CPU."""
    kept_K: torch.Tensor
    """int64 [K] on the CPU, ascending: the channels that stay."""
    matrices: dict[str, torch.Tensor]
    """By Hugging Face name, of the kept channels: those that are no slices of the source's; none if resumed."""
    record: BlockRecord | None
    """How a method beyond CAMERA's decided it."""


@dataclass(frozen=True)
class Routed:
    """What the router of a sparse layer did, and which experts stay."""

    tokens_E: torch.Tensor
    """int64 [E], how many tokens the source's router sends to each expert."""
    energy_E: torch.Tensor
    """float64 [E], Σ over its tokens of the squared norm of what each expert puts out, weighted as it counts."""
    kept_E: torch.Tensor
    """int64, ascending: the experts that stay."""
    stream: torch.Tensor
    """float64, one number: Σ over tokens of the squared norm of the hidden states that the layer puts out."""


@dataclass(frozen=True)
class Decision:
    """What is decided for one decoder layer: of every block that stays."""

    layer: int
    blocks: tuple[BlockDecision, ...]
    routed: Routed | None = None
    """None for a dense layer."""
    resumed: bool = False
    """Whether an earlier, killed run decided it, so that it was written then."""

    @property
    def matrices(self) -> dict[str, torch.Tensor]:
        """Those of all blocks."""
        return {name: matrix for block in self.blocks for name, matrix in block.matrices.items()}

    def stays(self) -> "Stays":
        """What of the layer goes into the model."""
        kept = {block.label: block.kept_K for block in self.blocks}
        return Stays(kept, None if self.routed is None else self.routed.kept_E, self.matrices)

    def without_matrices(self) -> "Decision":
        """The same, without what takes memory."""
        blocks = tuple(
            BlockDecision(each.label, each.statistics, each.scores_F, each.kept_K, {}, each.record)
            for each in self.blocks
        )
        return Decision(self.layer, blocks, self.routed, self.resumed)


@dataclass(frozen=True)
class Stays:
    """What of a layer goes into the pruned model."""

    kept: Labelled[torch.Tensor]
    """By label of every block that stays, in the source's numbers: int64 [K], ascending."""
    kept_E: torch.Tensor | None = None
    """int64, ascending, the experts that stay; None for a dense layer, and where all do."""
    matrices: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """By the source's Hugging Face name: those of the kept channels that are no slices."""


def decision_tensors(decisions: Sequence[Decision]) -> dict[str, torch.Tensor]:
    """All but the matrices as named tensors; `decisions_from` is the inverse."""
    tensors = statistics_tensors(
        [{block.label: block.statistics for block in decision.blocks} for decision in decisions]
    )
    for decision in decisions:
        for block in decision.blocks:
            record = None if block.record is None else asdict(block.record)
            text = torch.tensor(list(json.dumps(record).encode()), dtype=torch.uint8)
            for what, tensor in (("importance", block.scores_F), ("kept", block.kept_K), ("record", text)):
                tensors[tensor_name(decision.layer, block.label, what)] = tensor
    return tensors | routed_tensors([decision.routed for decision in decisions])


def decisions_from(tensors: dict[str, torch.Tensor], count: int, where: Path) -> list[Decision]:
    """The first `count` layers of what `decision_tensors` gave, as `resumed`.

    Raises:
        CameraError: if a layer is not there.
    """
    scores, kept, records = (
        labelled(tensors, what, count, where) for what in ("importance", "kept", "record")
    )
    routed = routed_from(tensors, count)
    decisions = []
    for layer, statistics in enumerate(statistics_from(tensors, count, where)):
        blocks = []
        for label, found in statistics.items():
            record = json.loads(bytes(records[layer][label].tolist()))
            blocks.append(
                BlockDecision(
                    label,
                    found,
                    scores[layer][label],
                    kept[layer][label],
                    {},
                    None if record is None else BlockRecord(**record),
                )
            )
        decisions.append(Decision(layer, tuple(blocks), routed[layer], resumed=True))
    return decisions


def routed_tensors(layers: Sequence[Routed | None]) -> dict[str, torch.Tensor]:
    """What routers did, as named tensors; `routed_from` is the inverse."""
    tensors = {}
    for layer, routed in enumerate(layers):
        if routed is not None:
            tensors[tensor_name(layer, "", "routed_tokens")] = routed.tokens_E
            tensors[tensor_name(layer, "", "energy")] = routed.energy_E
            tensors[tensor_name(layer, "", _EXPERTS)] = routed.kept_E
            tensors[tensor_name(layer, "", "stream")] = routed.stream
    return tensors


def routed_from(tensors: Mapping[str, torch.Tensor], count: int) -> list[Routed | None]:
    """What the routers of `count` layers did; None for dense layers."""
    names = ("routed_tokens", "energy", _EXPERTS, "stream")
    found = [[tensors.get(tensor_name(layer, "", what)) for what in names] for layer in range(count)]
    return [None if any(part is None for part in parts) else Routed(*parts) for parts in found]  # type: ignore[arg-type]


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
            "device": resolve_device(options.device).type,
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
            tensors[tensor_name(layer, "", _EXPERTS)] = stays.kept_E
    write_tensors(folder / KEPT, tensors)


def read_kept(folder: Path, count: int) -> list[Stays]:
    """What `write_kept` wrote; no matrices.

    Raises:
        CameraError: if a layer is not there.
    """
    tensors = read_tensors(folder / KEPT)
    layers = labelled(tensors, "kept", count, folder / KEPT)
    return [Stays(kept, tensors.get(tensor_name(layer, "", _EXPERTS))) for layer, kept in enumerate(layers)]


Records = Sequence[Labelled[BlockRecord]]
"""Of every layer, how blocks were decided by a method beyond CAMERA's."""


def records_of(decisions: Sequence[Decision]) -> Records:
    """Those of decisions."""
    return [
        {block.label: block.record for block in decision.blocks if block.record is not None}
        for decision in decisions
    ]


def _listed(records: Records) -> list[dict[str, Any]]:
    return [
        {"layer": layer, **({"block": label} if label else {}), **asdict(record)}
        for layer, blocks in enumerate(records)
        for label, record in blocks.items()
    ]


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
            "layers": _listed(records),
        },
    )


def read_records(listed: Sequence[Mapping[str, Any]], count: int) -> Records:
    """The records of `decisions.json`."""
    records: list[dict[str, BlockRecord]] = [{} for _ in range(count)]
    for each in listed:
        values = {name: value for name, value in each.items() if name not in ("layer", "block")}
        records[each["layer"]][each.get("block", "")] = BlockRecord(**values)
    return records


def matrices_file(layer: int) -> str:
    """Name of the file of a layer's matrices that are no slices of the source's."""
    return f"layer-{layer:04d}.safetensors"


def write_matrices(folder: Path, decision: Decision) -> None:
    """Write the matrices of a decision that are no slices, durably; an earlier run wrote those of a resumed one."""
    if matrices := decision.matrices:
        with atomic_file(folder / matrices_file(decision.layer)) as temporary:
            write_tensors(temporary, matrices)


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
        beyond = {"damping": plan.damping, "round": plan.round, "decisions": _listed(records)}
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
