"""One gated feed-forward network of a decoder layer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from camera.models.experts import Config, whole

FEED_FORWARD = ("gate", "up", "down")
GATE_UP = "gate_up"
"""Role of a matrix whose first half is the gate and whose second is up."""


@dataclass(frozen=True)
class Block:
    """One gated feed-forward network of a decoder layer."""

    prefix: str
    """Of all names of the decoder layer."""
    width_key: str
    """The key of config.json that F is made of."""
    by_role: Mapping[str, str] = field(hash=False)
    """Full names of its matrices: gate and up [F, H], or both in one [2F, H], and last down [H, F]."""
    times: int = 1
    """F is so many times what the key says."""
    expert: int | None = None
    """Its number, if tokens are routed to it."""
    shared: bool = False
    """Whether it stands beside experts and sees every token."""
    norm: str | None = None
    """Path in the decoder layer of the norm that what it puts out passes before it is added; None for none."""
    scale: float = 1.0
    """What it puts out is multiplied by before it is added."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its matrices; the last is that of down."""
        return tuple(self.by_role.values())

    @property
    def gate(self) -> str:
        """Name of the gate, where it is a matrix of its own."""
        return self.by_role["gate"]

    @property
    def up(self) -> str:
        """Name of up, where it is a matrix of its own."""
        return self.by_role["up"]

    @property
    def down(self) -> str:
        """Name of down."""
        return self.by_role["down"]

    @property
    def label(self) -> str:
        """What tells it from the layer's others: `experts.7`, `shared`; empty for the one of a dense layer."""
        return "shared" if self.shared else "" if self.expert is None else f"experts.{self.expert}"

    def linear(self, role: str) -> str:
        """The linear layer of a role: its path in the decoder layer's module. An expert's matrices are no such layers."""
        return self.by_role[role].removeprefix(self.prefix).removesuffix(".weight")

    def width(self, config: Config) -> int:
        """F."""
        return self.times * whole(config, self.width_key)


class Fused(NamedTuple):
    """Where a matrix of an expert lies in transformers' model, which holds those of a layer together."""

    parameter: str
    """Name of the parameter [E, 2F, H] of all gates and ups, or [E, H, F] of all downs."""
    expert: int
    rows: slice
    """Of the expert's part."""
