"""One decoder layer run over all samples: statistics of its feed-forward activations, then its output when narrowed.

Attention, gate and up run once. In sequential propagation the activations are kept within a budget of memory, and only
the down projection is computed again; a batch beyond the budget runs through the narrowed layer a second time.
"""

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from camera.devices import free_memory_bytes
from camera.layerwise.gram import LayerGram
from camera.layerwise.observers import squares
from camera.layerwise.runner import LayerRunner
from camera.layerwise.statistics import LayerStatistics, gather_channels
from camera.models.family import FEED_FORWARD, Block

ACTIVATION_BUDGET_BYTES = 1 << 30
"""Most memory that the activations of one layer may take in sequential propagation; beyond it they are recomputed."""
_SHARE_OF_FREE = 0.5


class FeedForwardPass:
    """One layer and the hidden states of all samples, which it replaces in place by what the layer puts out."""

    def __init__(
        self,
        layer: nn.Module,
        block: Block,
        call: Callable[[nn.Module, torch.Tensor], torch.Tensor],
        hidden_STH: torch.Tensor,
        batch_size: int,
        *,
        last: bool,
    ) -> None:
        """Args:
        layer: the decoder layer, with its weights.
        block: its feed-forward network.
        call: runs a layer.
        hidden_STH: what enters.
        batch_size: samples at once.
        last: whether no layer follows, so that nothing is to be put out.
        """
        self._layer = layer
        self._block = block
        self._call = call
        self._hidden_STH = hidden_STH
        self._batches = [slice(start, start + batch_size) for start in range(0, len(hidden_STH), batch_size)]
        self._last = last
        self._down = self._linear("down")
        self._device = self._down.weight.device
        self._held: dict[int, torch.Tensor] = {}  # activations by batch, as many as the budget allows
        self.input_squares_H = torch.zeros(self._down.out_features, dtype=torch.float64)
        """Σ x² of what enters gate and up, on the CPU; gathered where nothing is to be held."""

    @property
    def down_HF(self) -> torch.Tensor:
        """The down projection as the layer computes with it."""
        return self._down.weight

    def observe(
        self,
        *,
        sequential: bool,
        hold: bool = True,
        tell: Callable[[int], None],
        gram: LayerGram | None = None,
        held_S: Sequence[bool] = (),
    ) -> LayerStatistics:
        """Run the layer over all samples and gather statistics of what enters `down_proj`, and its Gram matrix.

        Args:
            sequential: whether `narrow` follows.
            hold: keep activations for it; not where gate and up will change, whose inputs are then measured.
            tell: told the samples seen.
            gram: to add to.
            held_S: which of the samples are held back.
        """
        statistics = LayerStatistics.zeros(self._down.in_features)
        room = min(ACTIVATION_BUDGET_BYTES, int(_SHARE_OF_FREE * free_memory_bytes(self._device)))
        room = room if hold else 0
        hook = None
        if not hold:
            hook = self._linear("gate").register_forward_pre_hook(self._see_input)

        def see(act_BTF: torch.Tensor) -> bool:
            nonlocal room
            statistics.update(act_BTF)
            if gram is not None:
                gram.update(act_BTF, held_S[batch])
            if self._last:
                return False
            if sequential and act_BTF.nbytes <= room:
                room -= act_BTF.nbytes
                self._held[number] = act_BTF
            return not sequential

        self._layer.set_submodule(self._block.linear("down"), _Recorder(self._down, see))
        for number, batch in enumerate(self._batches):
            out_BTH = self._call(self._layer, self._hidden_STH[batch].to(self._device))
            if not self._last and (not sequential or number in self._held):  # output, or residual stream
                self._hidden_STH[batch] = out_BTH.to(self._hidden_STH.device)
            tell(min(batch.stop, len(self._hidden_STH)))
        self._layer.set_submodule(self._block.linear("down"), self._down)
        if hook is not None:
            hook.remove()
        return statistics

    def _linear(self, role: str) -> nn.Linear:
        linear = self._layer.get_submodule(self._block.linear(role))
        assert isinstance(linear, nn.Linear)
        return linear

    def _see_input(self, gate: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self.input_squares_H += squares(inputs[0])

    def narrow(self, kept_K: torch.Tensor, matrices: Mapping[str, torch.Tensor]) -> None:
        """Make the hidden states what the layer puts out with the kept channels alone.

        Args:
            kept_K: int64 [K].
            matrices: `gate`, `up` or `down` of these channels, where they are not slices of the layer's own.
        """
        if self._last:
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
                out_BTH = self._hidden_STH[batch].to(self._device) + ffn_BTH
            else:
                if not narrowed:
                    self._narrow_matrices(kept_K, {**matrices, "down": kept_down_HK})
                    narrowed = True
                out_BTH = self._call(self._layer, self._hidden_STH[batch].to(self._device))
            self._hidden_STH[batch] = out_BTH.to(self._hidden_STH.device)

    def _narrow_matrices(self, kept_K: torch.Tensor, matrices: Mapping[str, torch.Tensor]) -> None:
        for role in FEED_FORWARD:
            linear = self._linear(role)
            weight = matrices[role].to(linear.weight) if role in matrices else linear.weight[kept_K]
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


def trial(
    runner: LayerRunner,
    hidden_BTH: torch.Tensor,
    batch_size: int,
    kept: int | None,
    gram: LayerGram | None = None,
) -> float:
    """Run the first layer on one batch as a capture does; the seconds without loading it. For estimates.

    Args:
        runner: of the model.
        hidden_BTH: what enters.
        batch_size: samples at once.
        kept: channels that stay, in sequential propagation.
        gram: to add to.
    """
    call = runner.caller(hidden_BTH.shape[1])
    block = runner.checkpoint.blocks(0)[0]
    with runner.layer(0) as module:
        started = time.perf_counter()
        run = FeedForwardPass(module, block, call, hidden_BTH.clone(), batch_size, last=False)
        held_S = [False] * len(hidden_BTH)
        run.observe(sequential=kept is not None, tell=lambda seen: None, gram=gram, held_S=held_S)
        if kept is not None:
            run.narrow(torch.arange(kept), {})
        return time.perf_counter() - started
