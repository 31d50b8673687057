"""A plan executed: the layers run one after the other over the calibration tokens, and each is decided.

In one-shot propagation a layer's output is the original model's. In sequential propagation a layer is narrowed as soon as
it is decided, and the next one sees what the narrowed layer puts out.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from camera.checkpoints.checkpoint import Checkpoint
from camera.devices import dtype_name, free_memory_bytes, resolve_device, resolve_dtype
from camera.digests import digest_json
from camera.errors import CameraError
from camera.files import reserve, temporary_sibling
from camera.layerwise.collectives import Collectives, ranks
from camera.layerwise.experts import IMPLEMENTATION
from camera.layerwise.experts_pass import Buffers, ExpertsPass
from camera.layerwise.feed_forward import FeedForwardPass, LayerPass, Samples
from camera.layerwise.gram import LayerGram, Target, held_back
from camera.layerwise.resume import StateFiles, StateSaver
from camera.layerwise.runner import LayerRunner
from camera.layerwise.statistics import BlockStatistics
from camera.models import Block
from camera.options import CaptureOptions
from camera.progress import Progress, silent
from camera.pruning.decision import BlockDecision, Decision, Routed, decision_tensors, decisions_from
from camera.pruning.importance import block_importance, joint_channels, kept_experts
from camera.pruning.methods import BlockRecord, Choice, ObservedBlock
from camera.pruning.plan import PrunePlan
from camera.pruning.sparsity import sparsified, zero_share
from camera.registry import PRUNING_METHODS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SHARE_OF_FREE = 0.5
LAYER_DAMPING = 1.0
"""Of what is added to the Gram matrix of an expert when it is to make good what dropped ones did: share of the mean diagonal
element over the layer's experts. Less fits the calibration text better and others worse: docs/moe.md."""


def decide(
    checkpoint: Checkpoint,
    tokens_ST: torch.Tensor,
    plan: PrunePlan,
    options: CaptureOptions,
    work: Path,
    before_saving: Callable[[], None] = lambda: None,
    progress: Progress = silent,
) -> Iterator[Decision]:
    """Run the layers and decide each; what is yielded is to be written before the next is asked for.

    The resume state is saved in `work` after a layer was yielded, as often as costs no more than a few per cent of the
    time. A run that finds a state of the same inputs there yields the layers it holds as `resumed` and goes on behind
    them. The last state stays: `clear_states` once what the run was for is safe.

    Args:
        checkpoint: the source.
        tokens_ST: int64 [samples, tokens].
        plan: what to decide.
        options: batch size, dtype, device, and over how many devices the samples are split.
        work: an existing folder for the resume state.
        before_saving: called before a state counts, in a thread, to make durable what was done with its layers.
        progress: told (samples done × layers, all).

    Raises:
        CameraError: for weights or activations with NaN or infinity, tokens outside the vocabulary, windows longer than
            the model's positions, or if another rank failed.
    """
    arguments = (checkpoint.folder, tokens_ST, plan, options, work)
    with ranks(options.devices, _other_rank, *arguments) as group:
        execution = _Execution(checkpoint, tokens_ST, plan, options, work, group)
        yield from execution.layers(before_saving, progress)


def _other_rank(group: Collectives, folder: Path, *arguments: Any) -> None:
    """What the other ranks do: the same layers over their samples."""
    tokens_ST, plan, options, work = arguments
    execution = _Execution(Checkpoint.open(folder), tokens_ST, plan, options, work, group)
    for _ in execution.layers(lambda: None, silent):
        pass


@dataclass(frozen=True)
class _Execution:
    """One rank's part of a run."""

    checkpoint: Checkpoint
    tokens_ST: torch.Tensor
    plan: PrunePlan
    options: CaptureOptions
    work: Path
    group: Collectives

    def layers(self, before_saving: Callable[[], None], progress: Progress) -> Iterator[Decision]:
        checkpoint, plan, group = self.checkpoint, self.plan, self.group
        device = self._device()
        dtype = resolve_dtype(self.options.dtype, checkpoint.dtype)
        self._check_tokens()
        mine_ST = group.share(self.tokens_ST)
        inputs = fingerprint(checkpoint, self.tokens_ST, dtype, plan)
        states = StateFiles(self.work, inputs, group.rank, group.count)
        held_S = group.share(torch.tensor(held_back(len(self.tokens_ST)))).tolist()
        runner = LayerRunner(checkpoint, device, dtype)
        count, samples = checkpoint.layer_count, len(mine_ST)
        with torch.inference_mode(), StateSaver(states, group, before_saving) as saver:
            decisions, hidden_STH = self._start(runner, states, mine_ST)
            yield from decisions
            passes = _Passes(self, runner, hidden_STH, held_S)
            for index in range(len(decisions), count):
                done = index * samples

                def tell(seen: int, done: int = done) -> None:
                    progress(done + seen, samples * count)

                with runner.layer(index) as module:
                    run = passes.begin(index, module, tell)
                    decision = self._decide_layer(index, run, passes)
                del run
                decisions.append(decision.without_matrices())
                yield decision
                del decision
                if index + 1 < count:
                    saver.save_if_due(index + 1, lambda: decision_tensors(decisions), hidden_STH)
        group.barrier()
        progress(samples * count, samples * count)

    def _decide_layer(self, index: int, run: LayerPass, passes: "_Passes") -> Decision:
        """Decide every block of a layer, and let it put out what stays."""
        plan = self.plan
        kept_E = (
            self._drop_experts(index, run, passes) if isinstance(run, ExpertsPass) and plan.drops else None
        )
        decided = self._jointly(index, run) if plan.scope == "layer" else self._one_by_one(index, run)
        run.finish()
        if not isinstance(run, ExpertsPass):
            return Decision(index, decided)
        self.group.all_reduce(run.tokens_E)
        self.group.all_reduce(run.stream)
        if kept_E is None:
            self.group.all_reduce(run.energy_E)
            kept_E = torch.arange(len(run.tokens_E))
        return Decision(index, decided, Routed(run.tokens_E, run.energy_E, kept_E, run.stream))

    def _drop_experts(self, index: int, run: ExpertsPass, passes: "_Passes") -> torch.Tensor:
        """Choose the experts that stay by what all of them put out, and route the tokens to those."""
        for block in run.blocks:
            if block.expert is not None:
                run.put_out(block, None, {})
        self.group.all_reduce(run.energy_E)
        experts = self.checkpoint.experts
        assert experts is not None
        groups = experts.groups(self.checkpoint.config)
        kept_E = kept_experts(run.energy_E, self.plan.experts_kept, groups)
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
            gram = None  # as large as a layer or more: not kept while the caller writes
            counts = self.plan.sequential or (isinstance(run, ExpertsPass) and run.aims)
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
        aims = isinstance(run, ExpertsPass) and run.aims
        if not plan.needs_gram or not (aims or plan.kept_of(block, width) < width):
            return None
        target = None
        if isinstance(run, ExpertsPass) and aims:
            damping = LAYER_DAMPING * float(run.squares)
            target = Target(width, self.checkpoint.hidden_size, self._device(), damping)
        return LayerGram(width, self._device(), target)

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
        """The decision of a block on every rank (its record is complete on the first), and its matrices by role.

        Scored with the checkpoint's own matrix, though the layer computes in another dtype, or on a device without float64.
        """
        plan = self.plan
        down_HF = self._down(block, run)
        scores_F = block_importance(self.checkpoint, block, statistics, plan.reduce_ratio, down_HF)
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
            matrices, record = self._sparse(block, observed, choice, run.input_squares_H)
        named = {block.by_role[role]: matrix for role, matrix in matrices.items()}
        return BlockDecision(block.label, statistics, scores_F, choice.kept_K, named, record), matrices

    def _down(self, block: Block, run: LayerPass) -> torch.Tensor:
        """The checkpoint's down projection: the layer's where it is that very one, as a second map would count twice."""
        if isinstance(run, FeedForwardPass):
            down_HF = run.down_HF
            if down_HF.device.type == "cpu" and down_HF.dtype == self.checkpoint.tensors[block.down].dtype:
                return down_HF
        return self.checkpoint.read(block.down)

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
                weight, squares = self.checkpoint.read(name).index_select(0, choice.kept_K), input_squares_H
            sparse[role] = sparsified(weight, squares, self.plan.sparsity)
        record = choice.record or BlockRecord("camera", False, None, 0, 0)
        return sparse, replace(
            record, zero_shares={role: zero_share(matrix) for role, matrix in sparse.items()}
        )

    def _start(
        self, runner: LayerRunner, states: StateFiles, mine_ST: torch.Tensor
    ) -> tuple[list[Decision], torch.Tensor]:
        """The layers that an earlier run decided, and the hidden states that enter the next one."""
        state = states.newest()
        if not self.group.all_equal(0 if state is None else state.count):
            state = None
        shape = *mine_ST.shape, self.checkpoint.hidden_size
        hidden_STH = _room(shape, runner.dtype, runner.device, self.work, self.group.count)
        if state is not None:
            hidden_STH.copy_(state.hidden_STH)
            return decisions_from(state.tensors, state.count, self.work), hidden_STH
        for start in range(0, len(mine_ST), self.options.batch_size):
            batch = slice(start, start + self.options.batch_size)
            hidden_STH[batch] = runner.embed(mine_ST[batch]).to(hidden_STH.device)
        return [], hidden_STH

    def _device(self) -> torch.device:
        """Each rank takes an accelerator of its own; on the CPU they share the cores."""
        device = resolve_device(self.options.device)
        if device.type == "cpu" or self.group.count == 1:
            return device
        return resolve_device(f"{device.type}:{self.group.rank}")

    def _check_tokens(self) -> None:
        length = self.tokens_ST.shape[1]
        positions = int(self.checkpoint.config.get("max_position_embeddings", length))
        if length > positions:
            raise CameraError(
                f"calibration windows of {length} tokens exceed the model's {positions} positions: lower the length"
            )
        if len(self.tokens_ST) < self.group.count:
            raise CameraError(
                f"{len(self.tokens_ST)} samples cannot be split over {self.group.count} devices: use fewer"
            )


def _room(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, work: Path, ranks_of_host: int
) -> torch.Tensor:
    """Room for hidden states where they fit: on the device, else in the host's memory, else in a mapped file."""
    size = prod(shape) * dtype.itemsize
    if device.type != "cpu" and size <= _SHARE_OF_FREE * free_memory_bytes(device):
        return torch.empty(shape, dtype=dtype, device=device)
    if ranks_of_host * size <= _SHARE_OF_FREE * free_memory_bytes(torch.device("cpu")):
        return torch.empty(shape, dtype=dtype)
    path = temporary_sibling(work / "hidden")
    with path.open("wb") as file:  # a full disk is an error here; through the map it would be a SIGBUS
        reserve(file.fileno(), size)
    mapped = torch.from_file(str(path), shared=True, size=prod(shape), dtype=dtype)
    path.unlink()  # the map keeps the file; its name is not needed again, and a kill leaves nothing behind
    return mapped.view(shape)


class _Passes:
    """What runs the layers one after the other: a pass of the kind that each is."""

    def __init__(
        self, execution: _Execution, runner: LayerRunner, hidden_STH: torch.Tensor, held_S: Sequence[bool]
    ) -> None:
        self._execution = execution
        self._runner = runner
        self._hidden_STH = hidden_STH
        self._held_S = held_S
        self._call = runner.caller(execution.tokens_ST.shape[1])

    @cached_property
    def _buffers(self) -> Buffers:
        execution, hidden_STH = self._execution, self._hidden_STH
        place = hidden_STH.dtype, self._runner.device, execution.work, execution.group.count
        return Buffers(hidden_STH, lambda: _room(tuple(hidden_STH.shape), *place))

    @cached_property
    def _narrower(self) -> "PreTrainedModel":
        """The pruned model's structure, on the meta device."""
        checkpoint, plan = self._execution.checkpoint, self._execution.plan
        return checkpoint.empty_model(IMPLEMENTATION, **plan.expert_count_changes(checkpoint))

    def narrower(self, index: int) -> nn.Module:
        """The sparse module of a layer of the pruned model."""
        prefix = self._execution.checkpoint.family.layer_prefix(index).removesuffix(".")
        return self._runner.sparse_module(self._narrower.get_submodule(prefix))

    def begin(self, index: int, module: nn.Module, tell: Callable[[int], None]) -> LayerPass:
        """The pass of one layer."""
        execution, plan = self._execution, self._execution.plan
        samples = Samples(self._hidden_STH, execution.options.batch_size, self._held_S, tell)
        last = index + 1 == execution.checkpoint.layer_count
        if execution.checkpoint.is_sparse(index):
            return ExpertsPass(self._runner, index, module, self._call, samples, self._buffers)
        (block,) = execution.checkpoint.blocks(index)
        ways = {"sequential": plan.sequential, "hold": not plan.sparsity, "last": last}
        return FeedForwardPass(module, block, self._call, samples, **ways)


def _where(index: int, block: Block) -> str:
    """What to call a block in messages."""
    return f"decoder layer {index}" + (f", {block.label}" if block.label else "")


def fingerprint(checkpoint: Checkpoint, tokens_ST: torch.Tensor, dtype: torch.dtype, plan: PrunePlan) -> str:
    """What an unfinished run belongs to. The weights stand by name, shape and file time: hashing them takes minutes."""
    return digest_json(
        {
            "config": checkpoint.config,
            "folder": str(checkpoint.folder.resolve()),
            "tensors": {name: list(info.shape) for name, info in checkpoint.tensors.items()},
            "changed": [(checkpoint.folder / file).stat().st_mtime_ns for file in checkpoint.weight_files],
            "shape": list(tokens_ST.shape),
            "tokens": digest_json(tokens_ST.flatten().tolist()),
            "dtype": dtype_name(dtype),
            "plan": plan.identity(),
        }
    )
