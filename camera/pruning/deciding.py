"""One layer decided: every block is observed, its channels are chosen, and what stays is put out."""

from dataclasses import dataclass, replace

import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.layerwise.collectives import Collectives
from camera.layerwise.experts_pass import ExpertsPass
from camera.layerwise.feed_forward import LayerPass
from camera.layerwise.gram import LayerGram, Target
from camera.layerwise.statistics import BlockStatistics, gather_channels, rows_of
from camera.models import Block
from camera.pruning.decision import BlockDecision, Decision, Routed
from camera.pruning.importance import block_importance, joint_channels, kept_experts
from camera.pruning.methods import BlockRecord, Choice, ObservedBlock
from camera.pruning.passes import Passes
from camera.pruning.plan import PrunePlan
from camera.pruning.sparsity import sparsified, zero_share
from camera.registry import PRUNING_METHODS

LAYER_DAMPING = 1.0
"""Of what is added to the Gram matrix of an expert when it is to make good what dropped ones did: share of the mean diagonal
element over the layer's experts. Less fits the calibration text better and others worse: docs/moe.md."""


@dataclass(frozen=True)
class LayerDecider:
    """One rank's part in deciding layers."""

    checkpoint: Checkpoint
    plan: PrunePlan
    device: torch.device
    group: Collectives
    slices: bool
    """Whether slices are wanted of the matrices that an accelerator has."""

    def decide(self, index: int, run: LayerPass, passes: Passes) -> Decision:
        """Decide every block of a layer, and let it put out what stays."""
        plan, kept_E = self.plan, None
        if plan.drops and isinstance(run, ExpertsPass):
            kept_E = self._drop_experts(index, run, passes)
        decided = self._jointly(index, run) if plan.scope == "layer" else self._one_by_one(index, run)
        sums = run.finish()
        if sums is None:
            return Decision(index, decided)
        for each in sums:
            self.group.all_reduce(each)
        kept_E = torch.arange(len(sums.tokens_E)) if kept_E is None else kept_E
        return Decision(index, decided, Routed(sums.tokens_E, sums.energy_E, kept_E, sums.stream))

    def _drop_experts(self, index: int, run: ExpertsPass, passes: Passes) -> torch.Tensor:
        """Choose the experts that stay by what all of them put out, and route the tokens to those."""
        for block in run.blocks:
            if block.expert is not None:
                run.put_out(block, None, {})
        energy_E = run.energy_E
        self.group.all_reduce(energy_E)
        experts = self.checkpoint.experts
        assert experts is not None
        groups = experts.groups(self.checkpoint.config)
        kept_E = kept_experts(energy_E, self.plan.experts_kept, groups)
        narrower, plan = passes.narrower(index), self.plan
        run.drop(kept_E, narrower, keeps_output=not plan.sequential, aims=plan.needs_gram)
        self.group.all_reduce(run.squares)
        return kept_E

    def _one_by_one(self, index: int, run: LayerPass) -> tuple[BlockDecision, ...]:
        """Every block by its own channels, and put out at once."""
        decided = []
        for block in run.blocks:
            gram = self._gram(block, run)
            statistics = self._observe(index, block, run, gram)
            decision, matrices = self._decide(index, block, run, statistics, gram)
            decision.slices.update(self._slices(block, run, decision))
            gram = None  # as large as a layer or more: not kept while the caller writes
            counts = self.plan.sequential or run.aims
            run.put_out(block, decision.kept_K if counts else None, matrices)
            decided.append(decision)
        return tuple(decided)

    def _jointly(self, index: int, run: LayerPass) -> tuple[BlockDecision, ...]:
        """All channels of the layer together; what stays is put out in a second visit."""
        found = {block.label: self._observe(index, block, run, None) for block in run.blocks}
        scores = {
            block.label: block_importance(self.checkpoint, block, found[block.label], self.plan.reduce_ratio)
            for block in run.blocks
        }
        kept = joint_channels(
            scores, sum(self.plan.kept_of(block, len(scores[block.label])) for block in run.blocks)
        )
        for block in run.blocks:
            run.put_out(block, kept[block.label] if self.plan.sequential else None, {})
        return tuple(
            BlockDecision(label, found[label], scores[label], kept_K, {}, None)
            for label, kept_K in kept.items()
        )

    def _gram(self, block: Block, run: LayerPass) -> LayerGram | None:
        plan, width = self.plan, block.width(self.checkpoint.config)
        if not plan.needs_gram or not (run.aims or plan.kept_of(block, width) < width):
            return None
        target = None
        if plan.streams > 1:
            target = Target(width, self.checkpoint.hidden_size, self.device, None)
        elif run.aims:
            damping = LAYER_DAMPING * float(run.squares)
            target = Target(width, self.checkpoint.hidden_size, self.device, damping)
        return LayerGram(width, self.device, target)

    def _observe(self, index: int, block: Block, run: LayerPass, gram: LayerGram | None) -> BlockStatistics:
        statistics = run.observe(block, gram)
        self.group.merge(statistics)
        statistics.check_finite(_where(index, block))
        return statistics

    def _decide(
        self,
        index: int,
        block: Block,
        run: LayerPass,
        statistics: BlockStatistics,
        gram: LayerGram | None,
    ) -> tuple[BlockDecision, dict[str, torch.Tensor]]:
        """The decision of a block on every rank (its record is complete on the first), and its matrices by role."""
        plan = self.plan
        own_HF, down_HF = self._down(block, run)
        scores_F = block_importance(self.checkpoint, block, statistics, plan.reduce_ratio, own_HF)
        kept = plan.kept_of(block, len(scores_F))
        observed = ObservedBlock(_where(index, block), kept, statistics, scores_F, down_HF, gram)
        if gram is not None:
            gram.merge(self.group)
            choice = self._broadcast(observed)
        else:  # every rank comes to the same choice from the same statistics; a block that loses nothing has no Gram matrix
            method = "camera" if PRUNING_METHODS[plan.method].needs_gram else plan.method
            choice = PRUNING_METHODS[method].decide(observed, plan)
        matrices = {} if choice.down_HK is None else {"down": choice.down_HK}
        record = choice.record
        if plan.sparsity:
            matrices, record = self._sparse(block, observed, choice, run.input_squares_H())
        named = {block.by_role[role]: matrix for role, matrix in matrices.items()}
        return BlockDecision(block.label, statistics, scores_F, choice.kept_K, named, record), matrices

    def _down(self, block: Block, run: LayerPass) -> tuple[torch.Tensor, torch.Tensor]:
        """The checkpoint's down projection where the layer computes, if it computes in its dtype, and on the CPU.

        On the CPU the layer's own, as a second map would count twice.
        """
        matrices = run.matrices(block)
        own_HF = None if matrices is None else matrices["down"]
        if own_HF is None or own_HF.dtype != self.checkpoint.tensors[block.down].dtype:
            own_HF = self.checkpoint.read(block.down)
        return own_HF, own_HF if own_HF.device.type == "cpu" else self.checkpoint.read(block.down)

    def _slices(self, block: Block, run: LayerPass, decision: BlockDecision) -> dict[str, torch.Tensor]:
        """What stays of the block's matrices where the accelerator has them as the checkpoint does: by name."""
        matrices = run.matrices(block) if self.slices and self.plan.mode == "physical" else None
        if matrices is None:
            return {}
        found, kept_K = {}, decision.kept_K.to(self.device)
        width = block.width(self.checkpoint.config)
        for role, name in block.by_role.items():
            matrix = matrices[role]
            if name not in decision.matrices and matrix.dtype == self.checkpoint.tensors[name].dtype:
                found[name] = (
                    gather_channels(matrix, kept_K)
                    if role == "down"
                    else matrix.index_select(0, rows_of(role, kept_K, width))
                )
        return found

    def _broadcast(self, block: ObservedBlock) -> Choice:
        """The choice of the first rank, on every rank."""
        if self.group.first:
            choice: Choice = PRUNING_METHODS[self.plan.method].decide(block, self.plan)
        else:
            choice = Choice(torch.empty(block.kept, dtype=torch.int64))
        self.group.broadcast(choice.kept_K)
        if self.group.broadcast_int(choice.down_HK is not None):
            down_HK = choice.down_HK
            if down_HK is None:
                down_HK = torch.empty(len(block.down_HF), block.kept, dtype=block.down_HF.dtype)
            self.group.broadcast(down_HK)
            choice = replace(choice, down_HK=down_HK)
        return choice

    def _sparse(
        self, block: Block, observed: ObservedBlock, choice: Choice, input_squares_H: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], BlockRecord]:
        """The block's matrices by role with their least weights set to zero, and the record with their share."""
        self.group.all_reduce(input_squares_H)
        squares_K = observed.statistics.sum_squares_F[choice.kept_K]
        sparse = {}
        for role, name in block.by_role.items():
            if role == "down":
                weight, squares = choice.down_HK, squares_K
                if weight is None:
                    weight = observed.down_HF.index_select(1, choice.kept_K)
            else:
                rows = rows_of(role, choice.kept_K, block.width(self.checkpoint.config))
                weight, squares = self.checkpoint.read(name).index_select(0, rows), input_squares_H
            sparse[role] = sparsified(weight, squares, self.plan.sparsity)
        record = choice.record or BlockRecord("camera", False, None, 0, 0)
        return sparse, replace(
            record, zero_shares={role: zero_share(matrix) for role, matrix in sparse.items()}
        )


def _where(index: int, block: Block) -> str:
    """What to call a block in messages."""
    return f"decoder layer {index}" + (f", {block.label}" if block.label else "")
