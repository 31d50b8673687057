"""Second moments of the inputs of linear layers, gathered while hidden states go through one decoder layer."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from camera.checkpoints.checkpoint import Checkpoint
from camera.devices import has_float64
from camera.layerwise.sums import ExactSum, sample_squares

Layer = Callable[[nn.Module, torch.Tensor], torch.Tensor]
"""Runs a module on hidden states [batch, tokens, hidden]; see `LayerRunner.caller`."""

_STRIP = 1024
"""Columns of second moments that are summed at once, without most of what is above their diagonal."""


class _Seen(BaseException):
    """Ends a forward pass from which nothing more is wanted; no error, so nothing on its way may catch it."""


def input_products(
    module: nn.Module, call: Layer, batches_BTH: Sequence[torch.Tensor], linear: str, device: torch.device
) -> torch.Tensor:
    """Σ x·xᵀ over all tokens, for the input x of one linear layer.

    The pass of a batch ends where that layer is reached. A batch's sum is float32, their total `total_dtype`.

    Args:
        module: a decoder layer.
        call: runs it.
        batches_BTH: its inputs.
        linear: name of the linear layer in the module.
        device: where the module computes.

    Returns:
        [I, I] on the device; above the diagonal it may be 0.
    """
    width = module.get_submodule(linear).get_parameter("weight").shape[1]
    total_II = torch.zeros(width, width, dtype=total_dtype(device), device=device)

    def add(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        _add_products(total_II, inputs[0])
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


def sum_of_products(chunks: Iterable[torch.Tensor], width: int, device: torch.device) -> torch.Tensor:
    """Σ x·xᵀ over chunks [N, I] on a device, in order; [I, I] as of `input_products`."""
    total_II = torch.zeros(width, width, dtype=total_dtype(device), device=device)
    for chunk_NI in chunks:
        _add_products(total_II, chunk_NI)
    return total_II


def total_dtype(device: torch.device) -> torch.dtype:
    """What sums over many batches are held in: float64 where the device computes in it."""
    return torch.float64 if has_float64(device) else torch.float32


def _add_products(total_II: torch.Tensor, hidden_BTI: torch.Tensor) -> None:
    """Add Σ x·xᵀ over all but the last dimension, a float32 sum, on and below the diagonal."""
    rows_NI = hidden_BTI.reshape(-1, hidden_BTI.shape[-1]).float()
    for start in range(0, rows_NI.shape[1], _STRIP):
        strip = slice(start, start + _STRIP)
        total_II[start:, strip] += rows_NI[:, start:].T @ rows_NI[:, strip]


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
