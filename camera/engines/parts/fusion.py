"""Linear layers that read the same input, computed by one matrix product."""

from collections.abc import Sequence

import torch
from torch import nn


class FusedLinear:
    """Several linear layers of one input as one, whose rows are theirs one below the other.

    Decoding reads every weight once whatever the number of products, but each product is a launch, and small ones leave
    most of a device idle. The layers' places in the model are taken by `Member`s.
    """

    def __init__(self, linear: nn.Module, sizes: Sequence[int]) -> None:
        """Args:
        linear: all of them.
        sizes: how many outputs each has.
        """
        self.linear, self.sizes = linear, list(sizes)
        self._input: torch.Tensor | None = None
        self._outputs: Sequence[torch.Tensor] = ()

    def outputs_of(self, member: int, x: torch.Tensor) -> torch.Tensor:
        """A member's outputs, [..., its size]; the first to ask has all computed, and the last frees them."""
        if x is not self._input:
            self._input, self._outputs = x, self.linear(x).split_with_sizes(self.sizes, -1)
        found = self._outputs[member]
        if member == len(self.sizes) - 1:
            self._input, self._outputs = None, ()
        return found


class Member(nn.Module):
    """One of the layers of a FusedLinear, in its place in the model."""

    def __init__(self, fused: FusedLinear, number: int) -> None:
        super().__init__()
        self.fused, self.number = fused, number

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fused.outputs_of(self.number, x)


def put_in_place(parent: nn.Module, names: Sequence[str], linear: nn.Module, sizes: Sequence[int]) -> str:
    """Exchange linear layers of a module for one that computes them all.

    Args:
        parent: the module that holds them.
        names: of the layers in it, in the order in which they are computed.
        linear: what computes all.
        sizes: their outputs.

    Returns:
        the path of `linear` in the parent.
    """
    fused, name = FusedLinear(linear, sizes), "_and_".join(names)
    parent.add_module(name, linear)
    for number, member in enumerate(names):
        parent.set_submodule(member, Member(fused, number))
    return name
