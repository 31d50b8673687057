"""One gated feed-forward network of a decoder layer."""

from dataclasses import dataclass
from typing import NamedTuple

from camera.models.experts import Config, whole

FEED_FORWARD = ("gate", "up", "down")


@dataclass(frozen=True)
class Block:
    """One gated feed-forward network of a decoder layer: full names of its matrices, gate and up [F, H], down [H, F]."""

    prefix: str
    """Of all names of the decoder layer."""
    width_key: str
    """The key of config.json that F is made of."""
    gate: str
    up: str
    down: str
    times: int = 1
    """F is so many times what the key says."""
    expert: int | None = None
    """Its number, if tokens are routed to it."""
    shared: bool = False
    """Whether it stands beside experts and sees every token."""

    @property
    def names(self) -> tuple[str, str, str]:
        """Names of gate, up and down."""
        return self.gate, self.up, self.down

    @property
    def by_role(self) -> dict[str, str]:
        """The names by `gate`, `up` and `down`."""
        return dict(zip(FEED_FORWARD, self.names, strict=True))

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
