"""What a GGUF file states of a mixture of experts and of latent attention beside its tensors, as data, in both directions.

The names are those that llama.cpp reads below the architecture's: `expert_count` of `qwen3moe.expert_count`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from camera.errors import CameraError

if TYPE_CHECKING:
    from camera.models.experts import Experts

Config = Mapping[str, Any]
Number = int | float | bool
N = TypeVar("N", int, float, bool)


class Read(Protocol):
    """Gives a number that a file states, or the default; raises CameraError if there is neither."""

    def __call__(self, name: str, kind: type[N], default: N | None = None) -> N: ...


class Part(NamedTuple):
    """Rows of each head of a matrix that a GGUF file holds as a tensor of its own: [heads, rows, row length]."""

    gguf: str
    """The tensor's name."""
    rows: str
    """Name of the size: rows of each head."""
    transposed: bool = False
    """Whether it is stored as [heads, row length, rows]."""


class Stated(NamedTuple):
    """A number of config.json that llama.cpp reads under a name of its own."""

    name: str
    key: str
    """Of config.json."""
    default: Number
    """What both mean by leaving it out; its type is the number's."""
    optional: bool = False
    """Whether it is left out of both where config.json has none."""


class Fixed(NamedTuple):
    """A key of config.json that llama.cpp's graph leaves no choice about."""

    key: str
    value: Any
    """What the graph computes."""
    default: Any
    """What the family's models mean by a config without the key."""
    otherwise: str
    """What to tell people of a model whose value is another."""


SILU = ("silu", "swish")
"""Names of one activation."""


class Activation(NamedTuple):
    """The activation of the gates that llama.cpp's graph computes, which no key of a file changes."""

    key: str = "hidden_act"
    """Of config.json."""
    computed: tuple[str, ...] = SILU
    """Its values in config.json; the first is what a file read back has."""


class Window(NamedTuple):
    """The sliding windows that llama.cpp's graph knows."""

    period: int
    """Every so many layers one attends to the whole context, where a file does not say which do."""
    assumed: Callable[[int], int] = lambda layers: 0
    """Tokens of the window in a model of so many layers whose file states no length; 0 if there is none."""

    def layers(self, count: int) -> list[bool]:
        """Which of so many layers see a window only, unless the file says otherwise."""
        return [(layer + 1) % self.period != 0 for layer in range(count)]


class Further(NamedTuple):
    """What follows from several keys together, in both directions."""

    numbers: Callable[[Config], Mapping[str, Number]]
    """What a file states, by name."""
    config: Callable[["Read", Config], Mapping[str, Any]]
    """Keys of config.json from what a file states, and the keys that are known already."""


@dataclass(frozen=True)
class GgufRules:
    """How a family's config.json and the keys of its GGUF files belong together."""

    stated: tuple[Stated, ...] = ()
    constants: Mapping[str, Number] = field(default_factory=dict)
    """What every file of the family says."""
    fixed: tuple[Fixed, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of config.json that every model of the family has."""
    latent: bool = False
    """Whether keys and values are made from a shared low-rank vector (multi-head latent attention)."""
    rotary_share: float = 1.0
    """How much of a head is turned by its position, where config.json leaves it unsaid."""
    lead: tuple[str, int] | None = None
    """The key of config.json for the number of dense layers before the first with experts, and its default."""
    groups: tuple[str, str, int] | None = None
    """The keys of config.json for the number of groups of experts and of those chosen, with the latter's default."""
    own_head: bool = False
    """Whether llama.cpp asks for an output head even where it is the embedding."""
    activation: Activation = field(default_factory=Activation)
    window: Window | None = None
    """None where the graph attends to the whole context in all layers."""
    further: Further | None = None
    rope: Callable[[Config], Config] = lambda config: config
    """The config whose rotary keys a file states, where layers differ in them."""
    reads_back: bool = True
    """Whether a file of the architecture is read as this family, and not as another that has it."""
    refuses: Callable[[Config], str | None] = lambda config: None
    """Why llama.cpp loads no such model, or computes another; None if it does."""
    differences: Callable[[Config], list[str]] = lambda config: []
    """What else llama.cpp computes in another way than transformers, a sentence each."""

    def problem(self, config: Config) -> str | None:
        """Why there is no GGUF file of a model: that llama.cpp would not load it or compute another; None if there is."""
        given = config.get(self.activation.key) or self.activation.computed[0]
        if given not in self.activation.computed:
            return (
                f"{self.activation.key} is {given!r}, and it computes {self.activation.computed[0]} in this architecture, "
                "whatever a file says. Use the pruned folder with transformers or vLLM instead"
            )
        return self.refuses(config)

    def warnings(self, config: Config) -> list[str]:
        """What of a model llama.cpp computes in another way than transformers, a sentence each."""
        found = [
            rule.otherwise
            for rule in self.fixed
            if config.get(rule.key, rule.default) not in (None, rule.value)
        ]
        return [*found, *self.differences(config)]


def normalised(graph: bool, default: bool) -> Fixed:
    """Whether the weights of the chosen experts add up to 1, where the graph decides it and not a key."""
    does = "makes add up to 1" if graph else "leaves as they are"
    return Fixed(
        "norm_topk_prob",
        graph,
        default,
        f"llama.cpp {does} the weights of the chosen experts in this family, and config.json says otherwise: its "
        "logits will differ",
    )


WINDOW, WINDOW_LAYERS = "attention.sliding_window", "attention.sliding_window_pattern"
SLIDING, FULL = "sliding_attention", "full_attention"
"""Kinds of layers in `layer_types` of config.json."""


def window_of(config: Config) -> int:
    """Tokens of the window that some layers see; 0 if all see the whole context."""
    window, kinds = config.get("sliding_window"), config.get("layer_types")
    slides = SLIDING in kinds if kinds else config.get("use_sliding_window", True)
    return int(window) if window and slides and window < config["max_position_embeddings"] else 0


SOFTMAX, SIGMOID = 1, 2
"""Values of `expert_gating_func`."""
LEAD = "leading_dense_block_count"
STEP = "interleave_moe_layer_step"


def numbers(rules: GgufRules, experts: "Experts | None", config: Config) -> dict[str, Number]:
    """What a file states of a model: whole numbers, floats and booleans by name.

    Raises:
        KeyError: if config.json lacks a key.
    """
    values: dict[str, Number] = {}
    if experts is not None:
        values["expert_count"] = experts.count(config)
        values["expert_used_count"] = experts.chosen(config)
        values["expert_feed_forward_length"] = int(config[experts.width_key])
        if (shared := experts.shared) is not None:
            times = shared.times(config)
            if shared.times_keys:
                values["expert_shared_count"] = times
            if times:
                values["expert_shared_feed_forward_length"] = times * int(config[shared.width_key])
        if rules.groups is not None:
            _, key, default = rules.groups
            count, used = experts.groups(config), int(config.get(key) or default)
            if used < count:  # else they do not restrict the choice
                values |= {"expert_group_count": count, "expert_group_used_count": used}
    for stated in rules.stated:
        given = config.get(stated.key)
        if given is not None or not stated.optional:
            values[stated.name] = type(stated.default)(stated.default if given is None else given)
    if rules.lead is not None:
        key, default = rules.lead
        values[LEAD] = int(config.get(key, default))
    if rules.latent:
        values |= _latent_numbers(config)
    if rules.further is not None:
        values |= rules.further.numbers(config)
    return {**values, **rules.constants}


def config_of(rules: GgufRules, experts: "Experts | None", read: Read) -> dict[str, Any]:
    """The keys of config.json that follow from what a file states.

    Raises:
        CameraError: if a number is missing, or two cannot be true together.
    """
    config: dict[str, Any] = {**rules.config, **{rule.key: rule.value for rule in rules.fixed}}
    if experts is not None:
        config[experts.count_keys[0]] = read("expert_count", int)
        config[experts.chosen_keys[0]] = read("expert_used_count", int)
        width = read("expert_feed_forward_length", int, read("feed_forward_length", int))
        config[experts.width_key] = width
        if (shared := experts.shared) is not None:
            total = read("expert_shared_feed_forward_length", int, 0)
            if shared.times_keys:
                config[shared.times_keys[0]] = read("expert_shared_count", int, total // width)
            else:
                config[shared.width_key] = total
        if rules.groups is not None:
            config[rules.groups[0]] = read("expert_group_count", int, 1) or 1
            config[rules.groups[1]] = read("expert_group_used_count", int, 1) or 1
    for stated in rules.stated:
        value = read(stated.name, type(stated.default), stated.default)
        config[stated.key] = value or (None if stated.optional else stated.default)
    if rules.lead is not None:
        key, lead = rules.lead
        config[key] = read(LEAD, int, lead)
    if rules.latent:
        config |= _latent_config(read)
    config[rules.activation.key] = rules.activation.computed[0]
    return config


def _latent_numbers(config: Config) -> dict[str, Number]:
    rank, rotary = int(config["kv_lora_rank"]), int(config["qk_rope_head_dim"])
    values = {
        "attention.kv_lora_rank": rank,
        "attention.key_length": rank + rotary,
        "attention.value_length": rank,
        "attention.key_length_mla": int(config["qk_nope_head_dim"]) + rotary,
        "attention.value_length_mla": int(config["v_head_dim"]),
        # llama.cpp knows by the number of layers which published models have none, and asks others for it
        "attention.q_lora_rank": int(config.get("q_lora_rank") or 0),
    }
    return dict(values)


def _latent_config(read: Read) -> dict[str, Any]:
    rotary, width = read("rope.dimension_count", int), read("attention.key_length_mla", int)
    if rotary >= width:
        raise CameraError(
            f"attention.key_length_mla is {width}, and {rotary} of it turn: the file is damaged"
        )
    return {
        "kv_lora_rank": read("attention.kv_lora_rank", int),
        "q_lora_rank": read("attention.q_lora_rank", int, 0) or None,
        "qk_rope_head_dim": rotary,
        "qk_nope_head_dim": width - rotary,
        "v_head_dim": read("attention.value_length_mla", int),
        "num_key_value_heads": read("attention.head_count", int),
        "head_dim": rotary,  # what transformers turns
    }
