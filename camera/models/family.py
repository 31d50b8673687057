"""What the tools must know of a model family, as data: its weights by role, and how they belong together.

A family is one module of `camera.models`, which registers it. Names are those of the Hugging Face checkpoint; `{layer}`
stands for the decoder layer's number and `{expert}` for the expert's.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from camera.models.block import FEED_FORWARD, GATE_UP, Block, Fused
from camera.models.experts import Config, Experts, whole
from camera.models.gguf import GgufRules
from camera.models.scales import Scales
from camera.models.weight import LAYER, Placed, Weight
from camera.registry import Registry

Size = Callable[[Config], int]
_LAYER_NUMBER = re.compile(re.escape(LAYER).replace(r"\{layer\}", r"(\d+)"))


def _already_known() -> None:
    """transformers has the family."""


@dataclass(frozen=True)
class Family:
    """One decoder-only architecture with gated feed-forward networks."""

    model_type: str
    """`model_type` of config.json."""
    architecture: str
    """The class in `architectures` of config.json."""
    gguf_architecture: str | None
    """`general.architecture` of a GGUF file, as llama.cpp knows it; None if it does not know the family."""
    weights: tuple[Weight, ...]
    """In the order in which a GGUF file holds them."""
    experts: Experts | None = None
    """None for a family without."""
    sizes: Mapping[str, Size] = field(default_factory=dict)
    """Sizes of its own that shapes are made of."""
    gguf_rules: GgufRules = field(default_factory=GgufRules)
    """What a GGUF file states beside the keys of every decoder, and what llama.cpp computes otherwise."""
    scales: Scales = field(default_factory=Scales)
    attention: Literal["sdpa", "eager"] = "sdpa"
    """transformers' way of computing attention: `eager` where only that bounds the scores."""
    left_out: tuple[str, ...] = ()
    """Keys that config.json may leave to transformers' config class, beside those of every family."""
    permutes_rotary: bool = False
    """Whether llama.cpp stores query and key with each head's rotary halves interleaved."""
    ignored: tuple[str, ...] = ("*.rotary_emb.inv_freq",)
    """Shell patterns of tensors that checkpoints hold and no loader needs."""
    prediction_layers_key: str | None = None
    """The key of config.json for layers behind the last that predict further tokens; a pruned model has none."""
    rotary_module: str = "model.rotary_emb"
    """Path of the rotary embedding in transformers' model."""
    refuses: Callable[[Config], str | None] = lambda config: None
    """Why a model with such a config.json cannot be worked with; None if it can."""
    register: Callable[[], None] = field(default=_already_known)
    """Makes transformers know the family; called before any Auto class is used."""
    config_code: Path | None = None
    """Our own Python code with the class that `auto_map` of published config.json names, for programs that ask for it."""

    def layer_prefix(self, layer: int) -> str:
        """Start of the names of one decoder layer's tensors; without the last dot, the path of its module."""
        return LAYER.format(layer=layer)

    def layer_of(self, name: str) -> int | None:
        """The decoder layer that a tensor belongs to; None for those outside the layers."""
        found = _LAYER_NUMBER.match(name)
        return int(found[1]) if found else None

    def name(self, role: str, layer: int = 0) -> str:
        """The name of the first weight with a role."""
        weight = next(weight for weight in self.weights if weight.role == role)
        return Placed(weight, layer, 0).name

    def names(self, config: Config) -> dict[str, Placed]:
        """The weights that a model has by its config, by name."""
        return {
            name: placed
            for name, placed in named_weights(self, config).items()
            if placed.weight.when is None or placed.weight.when.holds(config)
        }

    def is_sparse(self, config: Config, layer: int) -> bool:
        """Whether a decoder layer routes its tokens to experts."""
        return self.experts is not None and self.experts.is_sparse(config, layer)

    def blocks(self, config: Config, layer: int) -> tuple[Block, ...]:
        """The feed-forward networks of a decoder layer: one, or experts in order and then what they share."""
        if self.experts is None or not self.experts.is_sparse(config, layer):
            return (self._block("dense", self.feed_forward_key, layer, config),)
        experts = self.experts
        found = [
            self._block("expert", experts.width_key, layer, config, expert=expert)
            for expert in range(experts.count(config))
        ]
        if experts.shared is not None and (times := experts.shared.times(config)):
            found.append(self._block("shared", experts.shared.width_key, layer, config, times=times))
        return tuple(found)

    def fused(self, config: Config, layer: int) -> dict[str, Fused]:
        """Where transformers holds the experts' matrices of a decoder layer, by the matrices' names."""
        found: dict[str, Fused] = {}
        for block in self.blocks(config, layer):
            if self.experts is not None and block.expert is not None:
                module = f"{block.prefix}{self.experts.module}.experts"
                width = block.width(config)
                inner, outer = f"{module}.gate_up_proj", f"{module}.down_proj"
                found[block.gate] = Fused(inner, block.expert, slice(0, width))
                found[block.up] = Fused(inner, block.expert, slice(width, 2 * width))
                found[block.down] = Fused(outer, block.expert, slice(None))
        return found

    def _block(
        self,
        kind: str,
        width_key: str,
        layer: int,
        config: Config,
        *,
        expert: int | None = None,
        times: int = 1,
    ) -> Block:
        names = {
            weight.role: weight.name.format(layer=layer, expert=expert)
            for weight in self.weights
            if weight.block == kind and len(weight.shape) == 2
        }
        return Block(
            self.layer_prefix(layer),
            width_key,
            {role: names[role] for role in (*FEED_FORWARD[:2], GATE_UP, "down") if role in names},
            times,
            expert,
            shared=kind == "shared",
            norm=self.outside_blocks(config, layer).get("ffn_post_norm"),
            scale=self.scales.branch(config),
        )

    def width_keys(self, config: Config) -> tuple[str, ...]:
        """The keys of config.json whose widths pruning changes: the dense one's, or those of experts and what they share."""
        if self.experts is None:
            return (self.blocks(config, 0)[0].width_key,)
        keys = [self.experts.width_key]
        if self.experts.shared is not None and self.experts.shared.times(config):
            keys.append(self.experts.shared.width_key)
        return tuple(dict.fromkeys(keys))

    def restated(self, config: Config, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Keys of config.json that say again what a change of others changes, with their new values."""
        if self.experts is None or (width := changes.get(self.experts.width_key)) is None:
            return {}
        there = [key for key in self.experts.width_repeats if config.get(key) is not None]
        return {key: [width] * len(config[key]) if isinstance(config[key], list) else width for key in there}

    def ffn_width(self, config: Config) -> int:
        """Channels of every feed-forward network that is pruned; of a mixture of experts those of one expert."""
        return whole(config, self.width_keys(config)[0])

    @property
    def feed_forward_key(self) -> str:
        """The key of config.json for the channels of a dense layer, or of an expert in a family without dense layers."""
        dense = next(
            (
                weight.shape[1]
                for weight in self.weights
                if weight.block == "dense" and weight.role == "down" and len(weight.shape) == 2
            ),
            None,
        )
        if dense is not None:
            return dense
        assert self.experts is not None
        return self.experts.width_key

    def branches(self, config: Config, layer: int) -> tuple[tuple[str, ...], ...]:
        """Names of the matrices of each branch that adds to the residual stream; the last makes what is added."""
        attention = tuple(
            weight.name.format(layer=layer)
            for weight in self._linears(config, layer)
            if weight.block is None and not weight.exact
        )
        return (attention, *(block.names for block in self.blocks(config, layer)))

    def shared_inputs(self, config: Config, layer: int) -> tuple[tuple[str, ...], ...]:
        """Paths of the linear layers of a decoder layer, in the order of computing, those that share one input together.

        Experts and routers are not among them.
        """
        groups: dict[str, list[str]] = {}
        for weight in self._linears(config, layer):
            if not weight.exact and weight.reads is not None:
                path = weight.name.removeprefix(LAYER).removesuffix(".weight")
                groups.setdefault(weight.reads, []).append(path)
        return tuple(map(tuple, groups.values()))

    def outside_blocks(self, config: Config, layer: int) -> dict[str, str]:
        """Paths in a decoder layer of its norms and linear layers, by role; those of feed-forward blocks are not among them."""
        return {
            weight.role: weight.name.removeprefix(LAYER).removesuffix(".weight")
            for weight in self.weights
            if weight.name.startswith(LAYER)
            and weight.name.endswith(".weight")
            and weight.block is None
            and self._has(weight, config, layer)
        }

    def _linears(self, config: Config, layer: int) -> list[Weight]:
        """The matrices of a decoder layer's linear layers that a model has by its config."""
        return [
            weight
            for weight in self.weights
            if weight.reads is not None and weight.block != "expert" and self._has(weight, config, layer)
        ]

    def _has(self, weight: Weight, config: Config, layer: int) -> bool:
        if weight.when is not None and not weight.when.holds(config):
            return False
        return self._in_layer(weight, config, layer)

    def _in_layer(self, weight: Weight, config: Config, layer: int) -> bool:
        sparse = self.is_sparse(config, layer)
        if weight.block == "shared":
            assert self.experts is not None
            assert self.experts.shared is not None
            return sparse and self.experts.shared.times(config) > 0
        return weight.layers == "all" or (weight.layers == "sparse") == sparse

    def size(self, config: Config, name: str) -> int:
        """A size that shapes are made of: `query_size` and `key_size`, all heads together; `experts` and `shared_width`; one of
        the family's own; or a key of config.json. Any of them with `_twice` behind it is twice that."""
        if name in self.sizes:
            return self.sizes[name](config)
        if name == "experts":
            assert self.experts is not None
            return self.experts.count(config)
        if name == "shared_width":
            assert self.experts is not None
            assert self.experts.shared is not None
            return self.experts.shared.times(config) * whole(config, self.experts.shared.width_key)
        if name.endswith("_twice"):
            return 2 * self.size(config, name.removesuffix("_twice"))
        if name not in ("head_dim", "query_size", "key_size"):
            return int(name) if name.isdigit() else whole(config, name)
        heads = int(config["num_attention_heads"])
        head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
        if name == "head_dim":
            return head_dim
        if name == "query_size":
            return heads * head_dim
        return int(config.get("num_key_value_heads") or heads) * head_dim

    def shape(self, config: Config, weight: Weight) -> tuple[int, ...]:
        """The shape of a weight, of each expert if it is theirs."""
        return tuple(self.size(config, name) for name in weight.shape)

    def rotary_heads(self, weight: Weight, heads: int, kv_heads: int) -> int | None:
        """In how many heads llama.cpp permutes the rows of a weight; None if it does not."""
        return {"query": heads, "key": kv_heads}.get(weight.role) if self.permutes_rotary else None


FAMILIES: Registry[Family] = Registry("model family", "camera.models")


def named_weights(family: Family, config: Config) -> dict[str, Placed]:
    """Every weight that a model of a family may hold, conditions left aside, by its Hugging Face name, in order.

    Args:
        family: of the model.
        config: its `num_hidden_layers`, and what tells how many experts there are and where.
    """
    first = next(at for at, weight in enumerate(family.weights) if "{layer}" in weight.name)
    of_layers = [weight for weight in family.weights if "{layer}" in weight.name]
    experts = family.experts.count(config) if family.experts is not None else 0
    placed = [Placed(weight, 0, None) for weight in family.weights[:first]]
    for layer in range(int(config["num_hidden_layers"])):
        for weight in of_layers:
            if not family._in_layer(weight, config, layer):
                continue
            if weight.block == "expert":
                placed += [Placed(weight, layer, expert) for expert in range(experts)]
            else:
                placed.append(Placed(weight, layer, None))
    placed += [Placed(weight, 0, None) for weight in family.weights[first + len(of_layers) :]]
    return {each.name: each for each in placed}
