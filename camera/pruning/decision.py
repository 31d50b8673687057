"""The decision of a layer: what of it stays, found from what; and as named tensors, for a state to resume from."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from camera.layerwise.statistics import (
    BlockStatistics,
    Labelled,
    labelled,
    statistics_from,
    statistics_tensors,
    tensor_name,
)
from camera.pruning.methods import BlockRecord

EXPERTS = "experts_kept"


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
    slices: dict[str, torch.Tensor] = field(default_factory=dict)
    """By Hugging Face name, of the kept channels, where an accelerator has them: slices of the source's, in its dtype."""


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
        slices = {name: matrix for block in self.blocks for name, matrix in block.slices.items()}
        return Stays(kept, None if self.routed is None else self.routed.kept_E, slices | self.matrices)

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
    """By the source's Hugging Face name, of the kept channels: those that are no slices, and slices that are at hand."""


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
            tensors[tensor_name(layer, "", EXPERTS)] = routed.kept_E
            tensors[tensor_name(layer, "", "stream")] = routed.stream
    return tensors


def routed_from(tensors: Mapping[str, torch.Tensor], count: int) -> list[Routed | None]:
    """What the routers of `count` layers did; None for dense layers."""
    names = ("routed_tokens", "energy", EXPERTS, "stream")
    found = [[tensors.get(tensor_name(layer, "", what)) for what in names] for layer in range(count)]
    return [None if any(part is None for part in parts) else Routed(*parts) for parts in found]  # type: ignore[arg-type]


Records = Sequence[Labelled[BlockRecord]]
"""Of every layer, how blocks were decided by a method beyond CAMERA's."""


def records_of(decisions: Sequence[Decision]) -> Records:
    """Those of decisions."""
    return [
        {block.label: block.record for block in decision.blocks if block.record is not None}
        for decision in decisions
    ]
