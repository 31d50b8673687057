"""Second moments of the inputs of linear layers, gathered while hidden states go through one decoder layer."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from camera.checkpoints.checkpoint import Checkpoint
from camera.layerwise.sums import ExactSum, sample_squares

Layer = Callable[[nn.Module, torch.Tensor], torch.Tensor]
"""Runs a module on hidden states [batch, tokens, hidden]; see `LayerRunner.caller`."""


class _Seen(BaseException):
    """Ends a forward pass from which nothing more is wanted; no error, so nothing on its way may catch it."""


def input_products(
    module: nn.Module, call: Layer, batches_BTH: Sequence[torch.Tensor], linear: str, device: torch.device
) -> torch.Tensor:
    """Σ x·xᵀ over all tokens, for the input x of one linear layer.

    The pass of a batch ends where that layer is reached. A batch's sum is float32, their total float64.

    Args:
        module: a decoder layer.
        call: runs it.
        batches_BTH: its inputs.
        linear: name of the linear layer in the module.
        device: where the module computes.

    Returns:
        float64 [I, I] on the CPU.
    """
    width = module.get_submodule(linear).get_parameter("weight").shape[1]
    total_II = torch.zeros(width, width, dtype=torch.float64)

    def add(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        total_II.add_(products(inputs[0]))
        raise _Seen

    hook = module.get_submodule(linear).register_forward_pre_hook(add)
    try:
        for batch_BTH in batches_BTH:
            try:
                call(module, batch_BTH.to(device))
            except _Seen:
                continue
    finally:
        hook.remove()
    return total_II


@contextmanager
def input_squares(
    module: nn.Module, shared_inputs: Iterable[tuple[str, ...]]
) -> Iterator[dict[str, torch.Tensor]]:
    """Σ x² of the inputs of linear layers of a decoder layer, over all that goes through it within the block.

    Args:
        module: a decoder layer.
        shared_inputs: its linear layers, those that read the same input together (`Checkpoint.shared_inputs`).

    Yields:
        float64 [I] on the CPU by the name of each linear layer in the module, filled in when the block ends.
    """
    sums: dict[tuple[str, ...], ExactSum] = {}
    totals: dict[str, torch.Tensor] = {}
    hooks = []
    for group in shared_inputs:

        def add(_: nn.Module, inputs: tuple[torch.Tensor, ...], group: tuple[str, ...] = group) -> None:
            squares_BI = sample_squares(inputs[0])
            if group not in sums:
                sums[group] = ExactSum((squares_BI.shape[-1],), squares_BI.device)
            sums[group].add(squares_BI)

        hooks.append(module.get_submodule(group[0]).register_forward_pre_hook(add))
    try:
        yield totals
    finally:
        for hook in hooks:
            hook.remove()
    for group, total in sums.items():
        totals |= dict.fromkeys(group, total.read())


def products(hidden_BTI: torch.Tensor) -> torch.Tensor:
    """Σ x·xᵀ over all but the last dimension, float32 [I, I] on the CPU."""
    rows_NI = hidden_BTI.reshape(-1, hidden_BTI.shape[-1]).float()
    return (rows_NI.T @ rows_NI).cpu()


def sum_of_products(chunks: Iterable[torch.Tensor], width: int) -> torch.Tensor:
    """Σ x·xᵀ over chunks [N, I] in order, float64 [I, I] on the CPU."""
    total_II = torch.zeros(width, width, dtype=torch.float64)
    for chunk_NI in chunks:
        total_II += products(chunk_NI)
    return total_II


def advance(
    module: nn.Module, call: Layer, batches_BTH: Sequence[torch.Tensor], device: torch.device
) -> None:
    """Replace hidden states in place by what a decoder layer makes of them."""
    for batch_BTH in batches_BTH:
        batch_BTH.copy_(call(module, batch_BTH.to(device)))


def final_norm(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The norm between the last decoder layer and the output head, with its weights."""
    norm = checkpoint.empty_model().get_submodule(checkpoint.final_norm.removesuffix(".weight"))
    weight = checkpoint.read_finite(checkpoint.final_norm).to(device, dtype)
    norm.load_state_dict({"weight": weight}, strict=True, assign=True)
    return norm.requires_grad_(False)
