"""One dense decoder layer run over all samples: statistics of its feed-forward activations, then its output when narrowed.

Attention, gate and up run once. In sequential propagation the activations are kept within a budget of memory, and only
the down projection is computed again; a batch beyond the budget runs through the narrowed layer a second time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import nn

from camera.devices import free_memory_bytes
from camera.layerwise.gram import LayerGram, token_scales
from camera.layerwise.statistics import BlockStatistics, StatisticsSum, gather_channels, rows_of
from camera.layerwise.sums import ExactSum, sample_squares
from camera.models.block import Block

ACTIVATION_BUDGET_BYTES = 1 << 30
"""Most memory of a host that the activations of one layer may take in sequential propagation; beyond it they are recomputed."""
_SHARE_OF_FREE = 0.5
Call = Callable[[nn.Module, torch.Tensor], torch.Tensor]
"""Runs a layer on hidden states; see `LayerRunner.caller`."""


@dataclass(frozen=True)
class Samples:
    """What goes through a layer."""

    hidden_STH: torch.Tensor
    """Hidden states, replaced in place by what the layer puts out."""
    batch_size: int
    """Samples at once."""
    held_S: Sequence[bool]
    """Which are held back to judge a fit."""
    tell: Callable[[int], None] = lambda seen: None
    """Told the samples seen."""
    source_STH: torch.Tensor | None = None
    """Hidden states of the unpruned model, where blocks are to bring those of the pruned one near to them: replaced too."""

    @property
    def batches(self) -> list[slice]:
        size = self.batch_size
        return [slice(start, start + size) for start in range(0, len(self.hidden_STH), size)]

    def load(self, batch: slice, device: torch.device) -> torch.Tensor:
        """A batch on a device; the host does not wait for it."""
        return self.hidden_STH[batch].to(device, non_blocking=True)

    def store(self, batch: slice, out_BTH: torch.Tensor) -> None:
        """Replace a batch; where it lies in pinned memory the host must `synchronize` before it looks."""
        self.hidden_STH[batch].copy_(out_BTH, non_blocking=True)


class RouterSums(NamedTuple):
    """What a router did with all samples, on the CPU."""

    tokens_E: torch.Tensor
    """int64, how many tokens the source's router sends to each expert."""
    energy_E: torch.Tensor
    """float64, Σ over its tokens of the squared norm of what each expert puts out."""
    stream: torch.Tensor
    """float64, Σ over tokens of the squared norm of what the layer puts out."""


class LayerPass(Protocol):
    """One decoder layer and the hidden states of all samples: each of its blocks is observed, decided, and put out.

    Numbers stay where they are computed until a method returns them: within `observe` and `put_out` nothing waits for an
    accelerator.
    """

    @property
    def blocks(self) -> Sequence[Block]:
        """What is to be observed, in order."""

    @property
    def aims(self) -> bool:
        """Whether blocks are to make good what the layer's output lacks."""

    @property
    def squares(self) -> torch.Tensor:
        """float64, where they are: the mean diagonal element of the Gram matrices of the experts that stay."""

    def matrices(self, block: Block) -> dict[str, torch.Tensor] | None:
        """The block's matrices by role as the layer computes with them, if they are at hand; before it is put out."""

    def observe(self, block: Block, gram: LayerGram | None = None) -> BlockStatistics:
        """Statistics of what enters the block's `down_proj`, and its Gram matrix added to `gram`."""

    def put_out(
        self, block: Block, kept_K: torch.Tensor | None, matrices: Mapping[str, torch.Tensor]
    ) -> None:
        """Let the block's output count.

        Args:
            block: one that was observed.
            kept_K: int64 [K], the channels that take part; None for all.
            matrices: by role, of these channels, where they are not slices of the block's own.
        """

    def finish(self) -> RouterSums | None:
        """Make the hidden states what the layer puts out; what the router did, where there is one."""

    def input_squares_H(self) -> torch.Tensor:
        """Σ x² of what enters gate and up of the block observed last, float64 on the CPU; where it was asked for."""


def activation_room(device: torch.device) -> int:
    """Bytes that activations of one layer may take on a device: of an accelerator, which is there for it, half of what is free."""
    free = int(_SHARE_OF_FREE * free_memory_bytes(device))
    return min(ACTIVATION_BUDGET_BYTES, free) if device.type == "cpu" else free


class FeedForwardPass:
    """A dense layer's pass; see `LayerPass`."""

    aims = False
    squares = torch.zeros((), dtype=torch.float64)

    def __init__(
        self,
        layer: nn.Module,
        block: Block,
        call: Call,
        samples: Samples,
        *,
        sequential: bool,
        hold: bool = True,
        last: bool,
    ) -> None:
        """Args:
        layer: the decoder layer, with its weights.
        block: its feed-forward network.
        call: runs a layer.
        samples: what enters.
        sequential: whether the layer puts out what it is narrowed to.
        hold: keep activations for that; not where gate and up will change, whose inputs are then measured.
        last: whether no layer follows, so that nothing is to be put out.
        """
        self.blocks = (block,)
        self._layer = layer
        self._block = block
        self._call = call
        self._samples = samples
        self._hidden_STH = samples.hidden_STH
        self._batches = samples.batches
        self._sequential = sequential
        self._hold = hold
        self._last = last
        self._down = self._linear("down")
        self._device = self._down.weight.device
        self._held: dict[int, torch.Tensor] = {}  # activations by batch, as many as the budget allows
        self._input_squares_H = ExactSum((self._down.out_features,), self._device)

    def matrices(self, block: Block) -> dict[str, torch.Tensor]:
        """See `LayerPass`."""
        return {role: self._linear(role).weight for role in block.by_role}

    def input_squares_H(self) -> torch.Tensor:
        """See `LayerPass`."""
        return self._input_squares_H.read()

    def observe(self, block: Block, gram: LayerGram | None = None) -> BlockStatistics:
        """Run the layer over all samples; see `LayerPass`."""
        statistics = StatisticsSum(self._down.in_features, self._device)
        room = activation_room(self._device) if self._hold else 0
        adds = not (self._last or self._sequential)
        seen_BTF = torch.empty(0)

        def see(act_BTF: torch.Tensor) -> bool:
            nonlocal room, seen_BTF
            seen_BTF = act_BTF
            statistics.update(act_BTF)
            if not adds and not self._last and act_BTF.nbytes <= room:
                room -= act_BTF.nbytes
                self._held[number] = act_BTF
            return adds

        recorder = _Recorder(self._down, see)
        for number, batch in enumerate(self._batches):
            source_BTH = self._source(batch)
            with self._watched(recorder):
                out_BTH = self._call(self._layer, self._samples.load(batch, self._device))
            if gram is not None:
                ends_BTH = out_BTH if adds else out_BTH + self._branch(self._down(seen_BTF))
                self._add(gram, self._samples.held_S[batch], seen_BTF, (ends_BTH, source_BTH))
            # Output, or residual stream.
            if not self._last and (adds or number in self._held):
                self._samples.store(batch, out_BTH)
            self._samples.tell(min(batch.stop, len(self._hidden_STH)))
        return statistics.read()

    def _add(
        self,
        gram: LayerGram,
        held: Sequence[bool],
        act_BTF: torch.Tensor,
        ends: tuple[torch.Tensor, torch.Tensor | None],
    ) -> None:
        """Add a batch, each token as heavy as who reads the output takes it.

        Args:
            gram: of the block.
            held: which samples are held back.
            act_BTF: what enters `down_proj`.
            ends: what the layer puts out when it is whole, and what it is to put out.
        """
        own_BTH, wanted_BTH = ends
        missing_BTH = None
        if self._block.norm is not None:  # which reads the down projection's output alone
            own_BTH = self._down(act_BTF)
        elif wanted_BTH is not None:
            missing_BTH = (wanted_BTH.float() - own_BTH.float()) / self._block.scale
            own_BTH = wanted_BTH
        scale_BT1 = token_scales(own_BTH)
        for number, kept_back in enumerate(held):
            scale_T1 = scale_BT1[number]
            missing_TH = None if missing_BTH is None else missing_BTH[number] * scale_T1
            gram.update([act_BTF[number] * scale_T1.to(act_BTF.dtype)], [kept_back], [missing_TH])

    def _source(self, batch: slice) -> torch.Tensor | None:
        """What the layer puts out on the unpruned model's stream, which is replaced; None where that is not followed."""
        source_STH = self._samples.source_STH
        if source_STH is None:
            return None
        out_BTH = self._call(self._layer, source_STH[batch].to(self._device, non_blocking=True))
        source_STH[batch].copy_(out_BTH, non_blocking=True)
        return out_BTH

    @contextmanager
    def _watched(self, recorder: "_Recorder") -> Iterator[None]:
        """With a recorder in place of `down_proj`, and the inputs of gate and up measured where that was asked for."""
        hook = None
        if not self._hold:
            first = self._linear(next(iter(self._block.by_role)))
            hook = first.register_forward_pre_hook(self._see_input)
        self._layer.set_submodule(self._block.linear("down"), recorder)
        yield
        self._layer.set_submodule(self._block.linear("down"), self._down)
        if hook is not None:
            hook.remove()

    def put_out(
        self, block: Block, kept_K: torch.Tensor | None, matrices: Mapping[str, torch.Tensor]
    ) -> None:
        """See `LayerPass`; in one-shot propagation it is done already."""
        if self._last or kept_K is None:
            return
        kept_K = kept_K.to(self._device)
        bias = self._down.bias
        whole_HF = self._down.weight
        kept_down_HK = (
            matrices["down"].to(whole_HF) if "down" in matrices else gather_channels(whole_HF, kept_K)
        )
        narrowed = False
        for number, batch in enumerate(self._batches):
            if (act_BTF := self._held.pop(number, None)) is not None:
                ffn_BTH = nn.functional.linear(gather_channels(act_BTF, kept_K), kept_down_HK, bias)
                out_BTH = self._samples.load(batch, self._device) + self._branch(ffn_BTH)
            else:
                if not narrowed:
                    self._narrow_matrices(kept_K, {**matrices, "down": kept_down_HK})
                    narrowed = True
                out_BTH = self._call(self._layer, self._samples.load(batch, self._device))
            self._samples.store(batch, out_BTH)

    def finish(self) -> None:
        """See `LayerPass`: nothing is left to do."""

    def _linear(self, role: str) -> nn.Linear:
        linear = self._layer.get_submodule(self._block.linear(role))
        assert isinstance(linear, nn.Linear)
        return linear

    def _branch(self, ffn_BTH: torch.Tensor) -> torch.Tensor:
        """What is added to the residual stream for what the down projection makes."""
        if self._block.norm is not None:
            ffn_BTH = self._layer.get_submodule(self._block.norm)(ffn_BTH)
        return ffn_BTH if self._block.scale == 1 else ffn_BTH * self._block.scale

    def _see_input(self, gate: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self._input_squares_H.add(sample_squares(inputs[0]))

    def _narrow_matrices(self, kept_K: torch.Tensor, matrices: Mapping[str, torch.Tensor]) -> None:
        width = self._down.in_features
        for role in self._block.by_role:
            linear = self._linear(role)
            weight = (
                matrices[role].to(linear.weight)
                if role in matrices
                else linear.weight[rows_of(role, kept_K, width)]
            )
            linear.weight = nn.Parameter(weight, requires_grad=False)


class _Recorder(nn.Module):
    """Stands in for `down_proj`: sees the activations that enter it, and lets them through or not."""

    def __init__(self, down: nn.Linear, see: Callable[[torch.Tensor], bool]) -> None:
        super().__init__()
        self.down = down
        self.see = see

    def forward(self, act_BTF: torch.Tensor) -> torch.Tensor:
        if self.see(act_BTF):
            out_BTH: torch.Tensor = self.down(act_BTF)
            return out_BTH
        # Zeros in place of the FFN's output: the layer then returns its residual stream alone.
        return act_BTF.new_zeros(*act_BTF.shape[:-1], self.down.out_features)
