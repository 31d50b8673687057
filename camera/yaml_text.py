"""YAML from people one does not know: plain values only, and no more of them than the text has room for."""

from typing import Any

import yaml

_MAX_CHARACTERS = 1 << 20
_MAX_ALIASES = 100
_MAX_MERGED = 1000
_MAX_VALUES = 100_000


class _Bounded(yaml.SafeLoader):
    """The safe loader, which makes no objects, with a bound on aliases: nine lines of them stand for a billion values."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._aliases = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            self._aliases += 1
            if self._aliases > _MAX_ALIASES:
                raise yaml.YAMLError(f"more than {_MAX_ALIASES} aliases")
        return super().compose_node(parent, index)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)  # merges, which copy where a plain alias only points
        if len(node.value) > _MAX_MERGED:
            raise yaml.YAMLError(f"a mapping of more than {_MAX_MERGED} entries")


def parse_yaml(text: str) -> Any:
    """The plain values of a YAML text.

    Raises:
        ValueError: if it is no YAML, or has no measure.
    """
    if len(text) > _MAX_CHARACTERS:
        raise ValueError(f"{len(text)} characters, and no recipe needs more than {_MAX_CHARACTERS}")
    try:
        value = yaml.load(text, _Bounded)
        if _size(value, {}) > _MAX_VALUES:  # whoever walks over it walks over every alias again
            raise yaml.YAMLError(f"its aliases stand for more than {_MAX_VALUES} values")
        return value
    except (
        Exception
    ) as error:  # besides YAMLError, what int(), date() and others say of a value like 2024-99-99
        raise ValueError(str(error)) from None


def _size(value: Any, known: dict[int, int]) -> int:
    """How many values a walk over a value meets, without walking over any twice."""
    if not isinstance(value, dict | list | tuple | set):
        return 1
    if id(value) not in known:
        known[id(value)] = _MAX_VALUES + 1  # until it is counted: one that holds itself has no end
        inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_size(item, known) for item in inner)
    return known[id(value)]
