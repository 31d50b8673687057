"""One decoder layer that routes its tokens to experts, run over all samples at the cost of one forward pass.

Attention and router go first, for all samples: meanwhile the experts, and the network that they share, put out nothing, so
the layer's output is its residual stream. Then every expert is visited once with all its tokens: activations, statistics,
decision, and at once the output of what stays. No activation outlives its expert, and no expert sees a token that is
not routed to it.

Bits: a token's activations depend on no other token (`experts.activations` fills up rows that are too few, and windows of a
multiple of 32 tokens leave the router's functions no rest), each sample is summed in float32 and samples in float64, so that
neither batch size nor chunks nor memory change a byte. Ranks add float64 sums in another order: the last bit may differ.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import repeat

import torch
from torch import nn

from camera.devices import synchronize
from camera.heap import SteadyHeap
from camera.layerwise.experts import (
    Experts,
    Matrices,
    activations,
    attached,
    gather_rows,
    narrowed,
    output,
)
from camera.layerwise.feed_forward import Call, RouterSums, Samples, activation_room
from camera.layerwise.gram import LayerGram
from camera.layerwise.routing import route, route_again, take_weights
from camera.layerwise.runner import LayerRunner
from camera.layerwise.statistics import BlockStatistics, StatisticsSum, gather_channels
from camera.layerwise.sums import ExactSum, energies, sample_squares
from camera.layerwise.visits import Visit, Visits
from camera.models import Block
from camera.models.block import FEED_FORWARD

CHUNK_BYTES = 64 << 20
"""About so large are the activations that exist at once: whole samples, at least one."""
SLACK_BYTES = 16 << 20
"""How much a process may grow from expert to expert before its heap is trimmed."""


class Buffers:
    """Room for all samples' normed hidden states, and for what the feed-forward part adds; used for layer after layer."""

    def __init__(self, hidden_STH: torch.Tensor, room: Callable[[], torch.Tensor]) -> None:
        """Args:
        hidden_STH: of all samples.
        room: gives a tensor of this shape, dtype and device.
        """
        width = hidden_STH.shape[-1]
        self._room, self._width = room, width
        self.normed_TH = room().view(-1, width)
        self.added_TH = room().view(-1, width)

    @cached_property
    def missing_TH(self) -> torch.Tensor:
        """What the layer's output lacks, where that is to be made good."""
        return self._room().view(-1, self._width)


class ExpertsPass:
    """A sparse layer's pass; see `LayerPass`.

    Attributes:
        blocks: the experts that are left, by their places in the source, and the network that they share.
        tokens_E: see `RouterSums`.
        aims, squares: see `LayerPass`.
        act: the activation of the gates.
        device: where blocks compute.
        dtype: what they compute in.
        hidden_size: of the hidden states.
    """

    def __init__(
        self,
        runner: LayerRunner,
        index: int,
        layer: nn.Module,
        call: Call,
        samples: Samples,
        buffers: Buffers,
    ) -> None:
        """Run attention and router.

        Args:
            runner: of the model.
            index: the layer's number.
            layer: its module, with its weights.
            call: runs it.
            samples: what enters.
            buffers: of all samples.
        """
        self._runner = runner
        self._samples = samples
        self._buffers = buffers
        self._device = runner.device
        self.blocks = runner.checkpoint.blocks(index)
        self._sparse = runner.sparse_module(layer)
        self._experts = attached(runner.experts_module(layer))
        routing = route(layer, call, samples, self._experts, _shared_path(self.blocks), buffers.normed_TH)
        self._visited = Visits(routing, self._experts.count, len(samples.hidden_STH))
        self._places = {block.label: at for at, block in enumerate(self.blocks) if block.expert is not None}
        self.tokens_E = self._visited.tokens_E
        self._energy_E = ExactSum((self._experts.count,), runner.device)
        self.act = self._experts.act
        self._heap = SteadyHeap(SLACK_BYTES) if runner.device.type == "cpu" else None
        self.device, self.dtype = runner.device, runner.dtype
        self.hidden_size = samples.hidden_STH.shape[-1]
        self._put_out_before = False
        self.aims = False
        self.squares = torch.zeros((), dtype=torch.float64)
        self._held: list[torch.Tensor | None] = []
        self._observed: Block | None = None
        buffers.added_TH.zero_()

    def observe(self, block: Block, gram: LayerGram | None = None) -> BlockStatistics:
        """Compute the block's activations on the tokens that visit it; see `LayerPass`."""
        statistics = StatisticsSum(block.width(self._runner.checkpoint.config), self._device)
        self._held, self._observed = [], block
        room = activation_room(self._device)
        matrices = self._matrices(block)
        for visit in self._visits(block):
            hidden_NH = self._hidden(visit)
            act_NF = activations(hidden_NH, matrices, self._experts.act)
            weights = repeat(None) if visit.weight_N is None else visit.weight_N.split(visit.counts)
            statistics.update(act_NF.split(visit.counts), weights)
            if gram is not None:
                weighed_NF = (
                    act_NF.float() if visit.weight_N is None else act_NF * visit.weight_N.float()[:, None]
                )
                held = [self._samples.held_S[sample] for sample in visit.samples]
                gram.update(weighed_NF.split(visit.counts), held, self._missing(visit))
            holds = act_NF.nbytes <= room
            room -= act_NF.nbytes if holds else 0
            self._held.append(act_NF if holds else None)
        return statistics.read()

    def inputs(self, block: Block) -> Iterator[torch.Tensor]:
        """What enters the gate and up of a block: [N, H] on the device, in chunks of its tokens."""
        return map(self._hidden, self._visits(block))

    def put_out(
        self,
        block: Block,
        kept_K: torch.Tensor | None,
        matrices: Mapping[str, torch.Tensor],
        see: Callable[[torch.Tensor], None] = lambda act_NF: None,
    ) -> None:
        """See `LayerPass`. Activations that were not held are computed again.

        Args:
            block: one of `blocks`.
            kept_K: int64 [K], the channels that take part; None for all.
            matrices: as of `LayerPass`.
            see: given each chunk of what enters the down projection, [N, K], not weighted.
        """
        counts = not (self._put_out_before and block.expert is not None)
        if not (counts or self.aims):
            return
        whole = self._matrices(block)
        changes_input = bool({"gate", "up"} & matrices.keys())
        own = whole if kept_K is None else narrowed(whole, kept_K, matrices, inner=changes_input)
        held = self._held if self._observed is block else []
        place = self._places.get(block.label)
        for number, visit in enumerate(self._visits(block)):
            act_NF = held[number] if number < len(held) else None
            if act_NF is None and (self.aims or not changes_input):
                # Of all channels, as those that were held: narrower products sum in another order.
                act_NF = activations(self._hidden(visit), whole, self._experts.act)
            if self.aims:  # what goes is missing, until another block makes it good
                assert act_NF is not None
                self._add(self._buffers.missing_TH, visit, output(act_NF, whole.down_HF, visit.weight_N))
            if act_NF is None or changes_input:
                act_NF = activations(self._hidden(visit), own, self._experts.act)
            elif kept_K is not None:
                act_NF = gather_channels(act_NF, kept_K.to(act_NF.device))
            see(act_NF)
            out_NH = output(act_NF, own.down_HF, visit.weight_N)
            if self.aims:
                self._add(self._buffers.missing_TH, visit, -out_NH)
            if place is not None:
                self._energy_E[place].add(energies(out_NH, visit.counts))
            if counts:
                self._add(self._buffers.added_TH, visit, out_NH)
        self._held, self._observed = [], None
        if self._heap is not None:  # as many tokens as visit it, each expert leaves holes of another size
            self._heap.end_round()

    def _add(self, total_TH: torch.Tensor, visit: Visit, out_NH: torch.Tensor) -> None:
        total_TH.index_add_(0, visit.token_N.to(total_TH.device), out_NH.to(total_TH))

    def _missing(self, visit: Visit) -> Iterable[torch.Tensor | None]:
        if not self.aims:
            return repeat(None)
        missing_NH = gather_rows(self._buffers.missing_TH, visit.token_N).to(self._device)
        return list(missing_NH.split(visit.counts))

    def input_squares_H(self) -> torch.Tensor:
        """See `LayerPass`; the sums of samples are added in order."""
        total_H = ExactSum((self._samples.hidden_STH.shape[-1],), self._device)
        if self._observed is not None:
            for visit in self._visits(self._observed):
                for part_NH in self._hidden(visit).split(visit.counts):
                    total_H.add(sample_squares(part_NH))
        return total_H.read()

    def matrices(self, block: Block) -> dict[str, torch.Tensor] | None:
        """See `LayerPass`; an accelerator has them at hand."""
        if self._device.type == "cpu":
            return None
        return dict(zip(FEED_FORWARD, self._matrices(block), strict=True))

    @property
    def energy_E(self) -> torch.Tensor:
        """See `RouterSums`, of what was put out until now."""
        return self._energy_E.read()

    def finish(self) -> RouterSums:
        """See `LayerPass`."""
        hidden_STH, size = self._samples.hidden_STH, self._samples.batch_size
        stream = ExactSum((), hidden_STH.device)
        if hidden_STH.device != self._device:
            synchronize(self._device)  # the host adds, to what the device has stored
        added_STH = self._buffers.added_TH.view_as(hidden_STH)
        for batch_BTH, added_BTH in zip(hidden_STH.split(size), added_STH.split(size), strict=True):
            batch_BTH.add_(added_BTH)
            stream.add(energies(batch_BTH.flatten(0, 1), [hidden_STH.shape[1]] * len(batch_BTH)))
        return RouterSums(self.tokens_E, self.energy_E, stream.read())

    def drop(self, kept_E: torch.Tensor, narrower: nn.Module, *, keeps_output: bool, aims: bool) -> None:
        """Leave experts out, after all have been put out: the router chooses among those that stay.

        Args:
            kept_E: int64, ascending, the experts that stay.
            narrower: the sparse module of a model that has so many experts, on the meta device.
            keeps_output: whether what all experts have put out counts, and what those that stay put out does not.
            aims: whether those that stay are to make good what is missing: it is known from here on.
        """
        if aims:
            self._buffers.missing_TH.copy_(self._buffers.added_TH)
        if not keeps_output:
            self._buffers.added_TH.zero_()
        self._put_out_before = keeps_output
        shared = [block for block in self.blocks if block.expert is None]
        self.blocks = (*(self.blocks[expert] for expert in kept_E.tolist()), *shared)
        self._places = {}  # their energy is known
        take_weights(narrower, self._sparse, kept_E)
        chosen = Experts(self._experts.matrices, self._experts.act, len(kept_E))
        path = _shared_path(shared)
        name = None if path is None else path.rpartition(".")[2]
        routing = route_again(narrower, chosen, name, self._samples, self._buffers.normed_TH)
        self._visited = Visits(routing, len(kept_E), len(self._samples.hidden_STH))
        if aims:
            self._aim()

    def _aim(self) -> None:
        """Leave missing what the experts that stay do not put out themselves."""
        total, channels = ExactSum((), self._device), 0
        for block in self.blocks:
            if block.expert is None:
                continue
            matrices = self._matrices(block)
            channels += matrices.down_HF.shape[1]
            for visit in self._visits(block):
                act_NF = activations(self._hidden(visit), matrices, self._experts.act)
                assert visit.weight_N is not None
                total.add(energies(act_NF * visit.weight_N[:, None], visit.counts))
                self._add(self._buffers.missing_TH, visit, -output(act_NF, matrices.down_HF, visit.weight_N))
        self.aims = True
        self.squares = total.read() / channels

    def _matrices(self, block: Block) -> Matrices:
        return self._runner.matrices(block) if block.expert is None else self._experts.matrices(block.expert)

    def _hidden(self, visit: Visit) -> torch.Tensor:
        return gather_rows(self._buffers.normed_TH, visit.token_N).to(self._device)

    def _visits(self, block: Block) -> Iterator[Visit]:
        """The tokens that visit a block, in chunks of whole samples."""
        width = block.width(self._runner.checkpoint.config)
        rows = max(1, CHUNK_BYTES // (width * self._runner.dtype.itemsize))
        if block.expert is None:
            return self._visited.of_all(self._shared_weights(block), rows)
        place = next(at for at, other in enumerate(self.blocks) if other is block)
        return self._visited.of_expert(place, rows)

    def _shared_weights(self, block: Block) -> torch.Tensor | None:
        """What scales the output of the network that experts share."""
        experts = self._runner.checkpoint.family.experts
        assert experts is not None
        assert experts.shared is not None
        if experts.shared.gate is None:
            return None
        gate = self._sparse.get_submodule(experts.shared.gate)
        parts = self._buffers.normed_TH.split(self._samples.hidden_STH.shape[1])
        return torch.cat([torch.sigmoid(gate(part_TH.to(self._device)))[:, 0] for part_TH in parts])


def _shared_path(blocks: Sequence[Block]) -> str | None:
    """Path in the decoder layer of the network that experts share, if there is one."""
    shared = next((block for block in blocks if block.shared), None)
    return None if shared is None else shared.linear("down").rpartition(".")[0]
