"""What the tools must know of a model family, as data: its weights by role, and how they belong together.

A family is one module of `camera.models`, which registers it. Names are those of the Hugging Face checkpoint; `{layer}`
stands for the decoder layer's number.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from camera.registry import Registry

Config = Mapping[str, Any]
"""The keys of config.json."""
ATTENTION = ("query", "key", "value", "output")
FEED_FORWARD = ("gate", "up", "down")
_LINEARS = (  # role, module in the layer, GGUF name, shape, what it reads
    ("query", "self_attn.q_proj", "attn_q", ("query_size", "hidden_size"), "normed stream"),
    ("key", "self_attn.k_proj", "attn_k", ("key_size", "hidden_size"), "normed stream"),
    ("value", "self_attn.v_proj", "attn_v", ("key_size", "hidden_size"), "normed stream"),
    ("output", "self_attn.o_proj", "attn_output", ("hidden_size", "query_size"), "heads"),
    ("gate", "mlp.gate_proj", "ffn_gate", ("intermediate_size", "hidden_size"), "normed branch"),
    ("up", "mlp.up_proj", "ffn_up", ("intermediate_size", "hidden_size"), "normed branch"),
    ("down", "mlp.down_proj", "ffn_down", ("hidden_size", "intermediate_size"), "channels"),
)
_LAYER = "model.layers.{layer}."


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
    """One weight, or one of every decoder layer."""

    name: str
    role: str
    """`embedding`, `attention_norm`, `query`, `key`, `value`, `output`, `query_norm`, `key_norm`, `ffn_norm`, `gate`, `up`,
    `down`, `norm` or `head`; a bias has the role of its matrix."""
    shape: tuple[str, ...]
    """Names of sizes, as `Family.size` knows them."""
    gguf: str
    """Its name in a GGUF file."""
    when: When | None = None
    """None if every model of the family has it."""
    reads: str | None = None
    """What enters the linear layer; those of a layer with the same value share one input."""


@dataclass(frozen=True)
class Block:
    """One gated feed-forward network of a decoder layer: full names of its matrices, gate and up [F, H], down [H, F]."""

    prefix: str
    """Of all names of the decoder layer."""
    width_key: str
    """The key of config.json that holds F."""
    gate: str
    up: str
    down: str

    @property
    def names(self) -> tuple[str, str, str]:
        """Names of gate, up and down."""
        return self.gate, self.up, self.down

    @property
    def by_role(self) -> dict[str, str]:
        """The names by `gate`, `up` and `down`."""
        return dict(zip(FEED_FORWARD, self.names, strict=True))

    def linear(self, role: str) -> str:
        """The linear layer of a role: its path in the decoder layer's module."""
        return self.by_role[role].removeprefix(self.prefix).removesuffix(".weight")


def _already_known() -> None:
    """transformers has the family."""


@dataclass(frozen=True)
class Family:
    """One decoder-only architecture with gated feed-forward networks."""

    model_type: str
    """`model_type` of config.json."""
    architecture: str
    """The class in `architectures` of config.json."""
    gguf_architecture: str
    """`general.architecture` of a GGUF file, as llama.cpp knows it."""
    weights: tuple[Weight, ...]
    """In the order in which a GGUF file holds them."""
    permutes_rotary: bool = False
    """Whether llama.cpp stores query and key with each head's rotary halves interleaved."""
    ignored: tuple[str, ...] = ("*.rotary_emb.inv_freq",)
    """Shell patterns of tensors that checkpoints hold and no loader needs."""
    rotary_module: str = "model.rotary_emb"
    """Path of the rotary embedding in transformers' model."""
    register: Callable[[], None] = field(default=_already_known)
    """Makes transformers know the family; called before any Auto class is used."""

    def layer_prefix(self, layer: int) -> str:
        """Start of the names of one decoder layer's tensors; without the last dot, the path of its module."""
        return _LAYER.format(layer=layer)

    def name(self, role: str, layer: int = 0) -> str:
        """The name of the first weight with a role."""
        return next(weight.name.format(layer=layer) for weight in self.weights if weight.role == role)

    def names(self, config: Config, layers: int) -> dict[str, Weight]:
        """The weights that a model has by its config, by name."""
        return {
            name: weight
            for name, (weight, _) in named_weights(self, layers).items()
            if weight.when is None or weight.when.holds(config)
        }

    def blocks(self, config: Config, layer: int) -> tuple[Block, ...]:
        """The feed-forward networks of a decoder layer; a dense layer has one."""
        width = next(weight.shape[0] for weight in self.weights if weight.role == "gate")
        gate, up, down = (self.name(role, layer) for role in FEED_FORWARD)
        return (Block(self.layer_prefix(layer), width, gate, up, down),)

    def ffn_width(self, config: Config) -> int:
        """Channels of the first feed-forward network."""
        return int(config[self.blocks(config, 0)[0].width_key])

    def branches(self, config: Config, layer: int) -> tuple[tuple[str, ...], ...]:
        """Names of the matrices of each branch that adds to the residual stream; the last makes what is added."""
        attention = tuple(self.name(role, layer) for role in ATTENTION)
        return (attention, *(block.names for block in self.blocks(config, layer)))

    @property
    def shared_inputs(self) -> tuple[tuple[str, ...], ...]:
        """Paths of the linear layers of a decoder layer, in the order of computing, those that share one input together."""
        groups: dict[str, list[str]] = {}
        for weight in self.weights:
            if weight.reads is not None:
                path = weight.name.removeprefix(_LAYER).removesuffix(".weight")
                groups.setdefault(weight.reads, []).append(path)
        return tuple(map(tuple, groups.values()))

    def size(self, config: Config, name: str) -> int:
        """A size that shapes are made of: `query_size` and `key_size`, all heads together, or a key of config.json."""
        heads = int(config["num_attention_heads"])
        head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
        if name == "head_dim":
            return head_dim
        if name == "query_size":
            return heads * head_dim
        if name == "key_size":
            return int(config.get("num_key_value_heads") or heads) * head_dim
        return int(config[name])

    def rotary_heads(self, weight: Weight, heads: int, kv_heads: int) -> int | None:
        """In how many heads llama.cpp permutes the rows of a weight; None if it does not."""
        return {"query": heads, "key": kv_heads}.get(weight.role) if self.permutes_rotary else None


FAMILIES: Registry[Family] = Registry("model family", "camera.models")


@lru_cache(maxsize=64)
def named_weights(family: Family, layers: int) -> dict[str, tuple[Weight, str]]:
    """Every weight that a model of a family may hold, with its GGUF name, by its Hugging Face name, in order."""
    found: dict[str, tuple[Weight, str]] = {}
    first = next(at for at, weight in enumerate(family.weights) if "{layer}" in weight.name)
    of_layers = [weight for weight in family.weights if "{layer}" in weight.name]
    for weight in family.weights[:first]:
        found[weight.name] = weight, weight.gguf
    for layer in range(layers):
        for weight in of_layers:
            found[weight.name.format(layer=layer)] = weight, weight.gguf.format(layer=layer)
    for weight in family.weights[first + len(of_layers) :]:
        found[weight.name] = weight, weight.gguf
    return found


def decoder_weights(biases: Mapping[str, When | None], *, head_norms: bool = False) -> tuple[Weight, ...]:
    """The weights of a Llama-like decoder.

    Args:
        biases: roles of the linear layers that have a bias, with the condition, None for always.
        head_norms: whether query and key are normed in each head.
    """
    layer: list[Weight] = []
    for role, module, gguf, shape, reads in _LINEARS:
        if role == "query":
            layer.append(_norm("attention_norm", "input_layernorm", "attn_norm"))
        if role == "gate":
            if head_norms:
                layer.append(_norm("query_norm", "self_attn.q_norm", "attn_q_norm", "head_dim"))
                layer.append(_norm("key_norm", "self_attn.k_norm", "attn_k_norm", "head_dim"))
            layer.append(_norm("ffn_norm", "post_attention_layernorm", "ffn_norm"))
        name, stored = f"{_LAYER}{module}", f"blk.{{layer}}.{gguf}"
        layer.append(Weight(f"{name}.weight", role, shape, f"{stored}.weight", reads=reads))
        if role in biases:
            layer.append(Weight(f"{name}.bias", role, shape[:1], f"{stored}.bias", biases[role]))
    vocabulary = ("vocab_size", "hidden_size")
    untied = When("tie_word_embeddings", default=False, expected=False)
    return (
        Weight("model.embed_tokens.weight", "embedding", vocabulary, "token_embd.weight"),
        *layer,
        Weight("model.norm.weight", "norm", ("hidden_size",), "output_norm.weight"),
        Weight("lm_head.weight", "head", vocabulary, "output.weight", untied),
    )


def _norm(role: str, module: str, gguf: str, size: str = "hidden_size") -> Weight:
    return Weight(f"{_LAYER}{module}.weight", role, (size,), f"blk.{{layer}}.{gguf}.weight")
