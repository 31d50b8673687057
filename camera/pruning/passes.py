"""The hidden states of all samples, and the pass of each layer over them."""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from camera.devices import free_memory_bytes, pinned
from camera.files import reserve, temporary_sibling
from camera.layerwise.experts import IMPLEMENTATION
from camera.layerwise.experts_pass import Buffers, ExpertsPass
from camera.layerwise.feed_forward import FeedForwardPass, LayerPass, Samples
from camera.layerwise.runner import LayerRunner
from camera.pruning.plan import PrunePlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SHARE_OF_FREE = 0.5


def hidden_room(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, work: Path, ranks_of_host: int
) -> torch.Tensor:
    """Room for hidden states where they fit: on the device, else in the host's memory, else in a mapped file."""
    size = prod(shape) * dtype.itemsize
    if device.type != "cpu" and size <= _SHARE_OF_FREE * free_memory_bytes(device):
        return torch.empty(shape, dtype=dtype, device=device)
    if ranks_of_host * size <= _SHARE_OF_FREE * free_memory_bytes(torch.device("cpu")):
        return pinned(shape, dtype, device)
    path = temporary_sibling(work / "hidden")
    with path.open("wb") as file:  # a full disk is an error here; through the map it would be a SIGBUS
        reserve(file.fileno(), size)
    mapped = torch.from_file(str(path), shared=True, size=prod(shape), dtype=dtype)
    path.unlink()  # the map keeps the file; its name is not needed again, and a kill leaves nothing behind
    return mapped.view(shape)


class Passes:
    """What runs the layers one after the other: a pass of the kind that each is."""

    def __init__(
        self,
        runner: LayerRunner,
        plan: PrunePlan,
        streams_NSTH: torch.Tensor,
        batch_size: int,
        held_S: Sequence[bool],
        room: Callable[[], torch.Tensor],
    ) -> None:
        """Args:
        runner: of the source.
        plan: what is decided.
        streams_NSTH: what enters the first layer: of the pruned model, and of the source where that is followed.
        batch_size: samples at once.
        held_S: which are held back to judge a fit.
        room: gives a tensor for one more.
        """
        self._runner = runner
        self._plan = plan
        hidden_STH, *source = streams_NSTH
        self._samples = partial(
            Samples, hidden_STH, batch_size, held_S, source_STH=source[0] if source else None
        )
        self._call = runner.caller(hidden_STH.shape[1])
        self._hidden_STH = hidden_STH
        self._room = room

    @cached_property
    def _buffers(self) -> Buffers:
        return Buffers(self._hidden_STH, lambda: self._room()[0])

    @cached_property
    def _narrower(self) -> "PreTrainedModel":
        """The pruned model's structure, on the meta device."""
        checkpoint = self._runner.checkpoint
        return checkpoint.empty_model(IMPLEMENTATION, **self._plan.expert_count_changes(checkpoint))

    def narrower(self, index: int) -> nn.Module:
        """The sparse module of a layer of the pruned model."""
        prefix = self._runner.checkpoint.family.layer_prefix(index).removesuffix(".")
        return self._runner.sparse_module(self._narrower.get_submodule(prefix))

    def begin(self, index: int, module: nn.Module, tell: Callable[[int], None]) -> LayerPass:
        """The pass of one layer.

        Args:
            index: its number.
            module: it, with its weights.
            tell: told the samples seen.
        """
        checkpoint, plan, samples = self._runner.checkpoint, self._plan, self._samples(tell=tell)
        if checkpoint.is_sparse(index):
            return ExpertsPass(self._runner, index, module, self._call, samples, self._buffers)
        (block,) = checkpoint.blocks(index)
        last = index + 1 == checkpoint.layer_count
        ways = {"sequential": plan.sequential, "hold": not plan.sparsity, "last": last}
        return FeedForwardPass(module, block, self._call, samples, **ways)
