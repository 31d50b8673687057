"""The calibration tokens on their way through the decoder layers."""

from functools import cached_property

import torch
from torch import nn

from camera.layerwise.experts_pass import Buffers, ExpertsPass
from camera.layerwise.feed_forward import Samples
from camera.layerwise.observers import advance
from camera.layerwise.runner import LayerRunner


class HiddenStates:
    """Hidden states of all samples, layer after layer.

    Attributes:
        runner: of the model.
        call: runs a layer on a batch.
        batches_BTH: what enters the next layer, on the CPU: views of one tensor.
    """

    def __init__(self, runner: LayerRunner, hidden_STH: torch.Tensor, batch_size: int) -> None:
        """Args:
        runner: of the model.
        hidden_STH: what enters its first layer, on the CPU; overwritten.
        batch_size: samples at once.
        """
        self.runner = runner
        self.call = runner.caller(hidden_STH.shape[1])
        self.batches_BTH = list(hidden_STH.split(batch_size))
        self._samples = Samples(hidden_STH, batch_size, [False] * len(hidden_STH))

    def advance(self, module: nn.Module) -> None:
        """Bring them past a decoder layer."""
        advance(module, self.call, self.batches_BTH, self.runner.device)

    def experts(self, layer: int, module: nn.Module) -> ExpertsPass:
        """Bring them past attention and router of a layer with experts; its `finish` brings them past the layer."""
        return ExpertsPass(self.runner, layer, module, self.call, self._samples, self._buffers)

    def linears(self, layer: int) -> list[tuple[str, ...]]:
        """`Checkpoint.shared_inputs`, without what `experts` visits: the network that experts share."""
        checkpoint = self.runner.checkpoint
        visited = {
            block.linear(role)
            for block in checkpoint.blocks(layer)
            if checkpoint.is_sparse(layer)
            for role in block.by_role
        }
        return [group for group in checkpoint.shared_inputs(layer) if group[0] not in visited]

    @cached_property
    def _buffers(self) -> Buffers:
        hidden_STH = self._samples.hidden_STH
        return Buffers(hidden_STH, lambda: torch.empty_like(hidden_STH))
