"""How the channels of a feed-forward network are chosen, and what its down projection becomes: one file for each method.

A method is registered in `camera.registry.PRUNING_METHODS`; its name is the value of `prune.method`.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from camera.layerwise.gram import LayerGram
from camera.layerwise.statistics import BlockStatistics
from camera.pruning.plan import PrunePlan


@dataclass(frozen=True)
class ObservedBlock:
    """What is known of a feed-forward network when it is decided."""

    name: str
    """What to call it in messages: `layer 3`, `layer 3, experts.7`."""
    kept: int
    """How many of its channels are to stay."""
    statistics: BlockStatistics
    """Over all calibration tokens."""
    importance_F: torch.Tensor
    """CAMERA's importance, float64 [F] on the CPU."""
    down_HF: torch.Tensor
    """The down projection [hidden, F] in the checkpoint's dtype, on the CPU."""
    gram: LayerGram | None
    """Of a method that needs it."""


@dataclass(frozen=True)
class BlockRecord:
    """What was decided for a block and why, for `prune.json`."""

    method: str
    """What chose the channels in the end."""
    refitted: bool
    """Whether the down projection was refitted to them."""
    fallback: str | None
    """Why the method was rejected and CAMERA's choice used; None where it was not."""
    fit_tokens: int
    held_tokens: int
    """Calibration tokens that weights were fitted to, and that were held back to judge them."""
    error_camera: float | None = None
    """Of CAMERA's choice without a refit: share of the FFN output's energy lost on held-back tokens, if measured."""
    error: float | None = None
    """The same of what the method tried."""
    damping: float | None = None
    """Of a refit: that which loses least on held-back tokens."""
    zero_shares: dict[str, float] | None = None
    """Of the gate, up and down weights that stay, where sparsity was asked for: which share is zero."""


@dataclass(frozen=True)
class Choice:
    """One block, decided by a method."""

    kept_K: torch.Tensor
    """int64 [K] on the CPU, ascending."""
    down_HK: torch.Tensor | None = None
    """The new down projection in the checkpoint's dtype, on the CPU; None for the source's own columns."""
    record: BlockRecord | None = None


class PruningMethod(Protocol):
    """A way to decide a block."""

    needs_gram: bool
    """Whether it needs the Gram matrix of the activations, which costs time and memory."""
    title: str
    """What chooses the channels, for reports: `found with …`."""

    def decide(self, block: ObservedBlock, plan: PrunePlan) -> Choice:
        """Choose `block.kept` channels."""

    def multiplications(self, width: int, hidden: int, kept: int, dampings: int) -> int:
        """About how many float64 multiplications deciding a block takes, for estimates."""
