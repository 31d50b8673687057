"""Pruning as one would write it first: the whole model in memory, hooks, float64, plain Python sorting."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def seen_by_down_proj(model: Any, layer: int) -> Iterator[list[torch.Tensor]]:
    """While the block runs, gather what enters one layer's `down_proj`, float64 [tokens, F] per forward."""
    seen: list[torch.Tensor] = []

    def look(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen.append(args[0].detach().double().flatten(0, 1))

    handle = model.model.layers[layer].mlp.down_proj.register_forward_pre_hook(look)
    try:
        yield seen
    finally:
        handle.remove()


def activations(model: Any, tokens_ST: torch.Tensor, layer: int) -> torch.Tensor:
    """float64 [samples × tokens, F]: what enters `down_proj` of one layer."""
    with seen_by_down_proj(model, layer) as seen, torch.no_grad():
        for sample_T in tokens_ST:
            model(sample_T[None])
    return torch.cat(seen)


def scores(act_NF: torch.Tensor, down_HF: torch.Tensor, alpha: float) -> list[float]:
    """Importance, channel by channel."""
    result = []
    for channel in range(down_HF.shape[1]):
        column = down_HF[:, channel].detach().double()
        squares = act_NF[:, channel] ** 2
        energy = (1 - alpha) * squares.sum() + alpha * squares.max()
        result.append(float(column.dot(column) * energy))
    return result


def best(values: list[float], count: int) -> list[int]:
    """Indices of the `count` largest, ascending; the first of equals."""
    return sorted(sorted(range(len(values)), key=lambda index: (-values[index], index))[:count])


def slice_layer(model: Any, layer: int, kept: list[int]) -> None:
    """Keep these channels of one layer."""
    mlp = model.model.layers[layer].mlp
    mlp.gate_proj.weight = nn.Parameter(mlp.gate_proj.weight[kept].clone())
    mlp.up_proj.weight = nn.Parameter(mlp.up_proj.weight[kept].clone())
    mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight[:, kept].clone())


def prune_model(
    model: Any,
    tokens_ST: torch.Tensor,
    alpha: float,
    count: int,
    propagate: str,
    see: Callable[[int, torch.Tensor], None] = lambda layer, act_NF: None,
) -> list[list[int]]:
    """Prune a transformers model in place and tell which channels stayed; `see` is told every activation."""
    kept: list[list[int]] = []
    for layer, block in enumerate(model.model.layers):
        act_NF = activations(model, tokens_ST, layer)
        see(layer, act_NF)
        kept.append(best(scores(act_NF, block.mlp.down_proj.weight, alpha), count))
        if propagate == "sequential":
            slice_layer(model, layer, kept[-1])
    if propagate == "one-shot":
        for layer, channels in enumerate(kept):
            slice_layer(model, layer, channels)
    return kept
