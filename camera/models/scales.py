"""The numbers by which a family multiplies beside its weights, as data."""

from collections.abc import Callable
from dataclasses import dataclass

from camera.models.experts import Config

Number = Callable[[Config], float]


def _one(config: Config) -> float:
    return 1.0


@dataclass(frozen=True)
class Scales:
    """What a model of such a config multiplies by."""

    embedding: Number = _one
    """The rows of the embedding, before the first layer."""
    branch: Number = _one
    """What attention and feed-forward part add to the residual stream."""
    logits: Number = _one
    """What the output head makes."""
    softcap: str | None = None
    """The key of config.json for the bound c of logits, which become c · tanh(logits / c); no value is no bound."""

    def plain(self, config: Config) -> bool:
        """Whether nothing is multiplied or bounded, but rows of the embedding."""
        return self.branch(config) == self.logits(config) == 1 and not self.bound(config)

    def bound(self, config: Config) -> float | None:
        """The bound of logits."""
        return config.get(self.softcap) if self.softcap else None
