"""How the mixture-of-experts layers of a family are made, as data, and the numbers of config.json that say so."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from camera.errors import CameraError

Config = Mapping[str, Any]
"""The keys of config.json."""
MOST_EXPERTS = 1 << 14


@dataclass(frozen=True)
class Shared:
    """The network beside the experts that every token visits."""

    module: str
    """Its path in the mixture-of-experts module."""
    width_key: str
    times_keys: tuple[str, ...] = ()
    """Keys of config.json, the first that is there counts: its width is so many times that of the width key, 0 is none."""
    gate: str | None = None
    """Path of the linear layer in the mixture-of-experts module whose sigmoid scales its output; None for a scale of 1."""

    def times(self, config: Config) -> int:
        """How many times the width key its width is; 0 for a model without it."""
        if self.times_keys:
            return whole(config, _first(self.times_keys, config), 0)
        return min(1, whole(config, self.width_key, 0))


@dataclass(frozen=True)
class Experts:
    """How the mixture-of-experts layers of a family are made."""

    count_keys: tuple[str, ...]
    """Keys of config.json for the number of experts; the first that is there counts."""
    chosen_keys: tuple[str, ...]
    """The same for how many a token is routed to."""
    width_key: str
    """The key of every expert's width."""
    width_repeats: tuple[str, ...] = ()
    """Further keys for it that configs may hold, as a number or as a list with one for every layer."""
    is_sparse: Callable[[Config, int], bool] = lambda config, layer: True
    """Whether a decoder layer routes its tokens to experts."""
    shared: Shared | None = None
    groups: Callable[[Config], int] = lambda config: 1
    """How many groups of equally many, consecutive experts the router knows; all keep equally many."""
    least_per_group: Callable[[Config], int] = lambda config: 1
    """How many experts each of the groups must have for the router to work."""
    module: str = "mlp"
    """Path of the mixture-of-experts module in transformers' decoder layer; its experts are its `experts`."""

    def count(self, config: Config) -> int:
        """Experts of a layer."""
        return whole(config, self.count_key(config))

    def chosen(self, config: Config) -> int:
        """Experts that a token is routed to."""
        return whole(config, _first(self.chosen_keys, config))

    def used(self, config: Config, size: int) -> int:
        """What a token uses of something that all experts of a layer have equal parts in."""
        return size * self.chosen(config) // self.count(config)

    def count_key(self, config: Config) -> str:
        """The key that a config gives the number of experts by."""
        return _first(self.count_keys, config)

    def least(self, config: Config) -> int:
        """The fewest experts that the router can choose from."""
        return max(self.chosen(config), self.groups(config) * self.least_per_group(config))

    def problem(self, config: Config) -> str | None:
        """Why no model can be of these numbers; None if one can."""
        count, chosen, groups = self.count(config), self.chosen(config), self.groups(config)
        if self.shared is not None:
            self.shared.times(config)
        if not 0 < count <= MOST_EXPERTS:
            return f"{self.count_key(config)} is {count}: there must be 1 to {MOST_EXPERTS} experts"
        if not 0 < chosen <= count:
            return f"{chosen} experts for a token, and there are {count}"
        if groups < 1 or count % groups:
            return f"{count} experts cannot be in {groups} groups of equally many"
        if count < (least := self.least(config)):
            return f"{count} experts in {groups} groups, and the router needs {least} to choose {chosen} for a token"
        return None


def whole(config: Config, key: str, default: int | None = None) -> int:
    """A number of config.json that is not below zero; of a list with one for every layer, the one that all are.

    Raises:
        CameraError: if it is something else, or missing without a default.
    """
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, list) and value and all(each == value[0] for each in value):
        value = value[0]
    if type(value) is not int or value < 0:
        raise CameraError(f"config.json: {key} is {str(value)[:60]!r}, not one whole number")
    return value


def enough_to_choose(config: Config, *, scored: int = 1) -> int:
    """How many experts a group must have where tokens choose from `topk_group` groups only.

    Args:
        config: with `num_experts_per_tok` and `topk_group`.
        scored: how many of its experts a group is scored by.
    """
    chosen, groups = whole(config, "num_experts_per_tok"), max(1, whole(config, "topk_group", 1))
    return max(scored, -(-chosen // groups))


def layers_of(config: Config, key: str) -> list[int]:
    """Layers that config.json lists; none without the key.

    Raises:
        CameraError: if it is something else.
    """
    found = config.get(key) or []
    if not isinstance(found, list):
        raise CameraError(f"config.json: {key} is {str(found)[:60]!r}, not a list of layers")
    return found


def _first(keys: tuple[str, ...], config: Config) -> str:
    return next((key for key in keys if config.get(key) is not None), keys[0])
