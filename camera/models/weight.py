"""One weight of a family, as data: its name, role, shape and condition."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from camera.models.experts import Config
from camera.models.gguf import Part

ATTENTION = ("query", "key", "value", "output")
LAYER = "model.layers.{layer}."


class When(NamedTuple):
    """A condition on config.json: whether a key is true, or false."""

    key: str
    default: bool
    """What the family's models mean by a config without the key."""
    expected: bool = True

    def holds(self, config: Config) -> bool:
        return bool(config.get(self.key, self.default)) == self.expected


@dataclass(frozen=True)
class Weight:
    """One weight, or one of every decoder layer, or one of every expert."""

    name: str
    role: str
    """`embedding`, `attention_norm`, `query`, `key`, `value`, `output`, `query_norm`, `key_norm`, `ffn_norm`, `gate`, `up`,
    `down`, `router`, `norm`, `head` or one of the family's own; a bias has the role of its matrix."""
    shape: tuple[str, ...]
    """Names of sizes, as `Family.size` knows them; `experts` is the dimension that loses what dropped experts had."""
    gguf: str
    """Its name in a GGUF file; those of all experts together have one."""
    when: When | None = None
    """None if every model of the family has it."""
    reads: str | None = None
    """What enters the linear layer; those of a layer with the same value share one input."""
    layers: Literal["all", "dense", "sparse"] = "all"
    """Which decoder layers have it: in a `sparse` one tokens are routed to experts."""
    block: Literal["dense", "expert", "shared"] | None = None
    """Of a feed-forward matrix: which kind of network it belongs to."""
    exact: bool = False
    """Whether it is kept in float32 in a GGUF file though it is a matrix, as routers are."""
    stored_plus: float = 0.0
    """What a GGUF file adds to it: 1 to the weights of norms that multiply by one more than they hold."""
    parts: tuple[Part, ...] = ()
    """What a GGUF file holds in place of it, in the order of each head's rows; `gguf` then names nothing."""

    @property
    def stored(self) -> tuple[str, ...]:
        """Names of all that a GGUF file holds of it."""
        return tuple(part.gguf for part in self.parts) or (self.gguf,)


class Placed(NamedTuple):
    """A weight in its place in a model."""

    weight: Weight
    layer: int
    expert: int | None

    @property
    def name(self) -> str:
        """In a Hugging Face checkpoint."""
        return self.weight.name.format(layer=self.layer, expert=self.expert)

    @property
    def gguf(self) -> str:
        """In a GGUF file."""
        return self.weight.gguf.format(layer=self.layer)
