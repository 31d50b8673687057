"""YAML of unknown origin: plain values only, and no more of them than the text has room for."""

from typing import Any

import yaml

MAX_CHARACTERS = 1 << 20
_MAX_VALUES = 100_000


class _BoundedLoader(yaml.SafeLoader):
    """The safe loader, which makes no objects, with a bound on values: nine lines of aliases stand for a billion."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._count = 0
        self._sizes: dict[int, int] = {}
        """Values that a node stands for, itself and its aliases included, by its id."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        before, is_alias = self._count, self.check_event(yaml.AliasEvent)
        self._count += 0 if is_alias else 1
        node = super().compose_node(parent, index)
        if is_alias:
            self._count += self._sizes.get(id(node), _MAX_VALUES)  # unknown: it holds itself
        self._sizes.setdefault(id(node), self._count - before)
        if self._count > _MAX_VALUES:
            raise yaml.YAMLError(f"its aliases stand for more than {_MAX_VALUES} values")
        return node


def parse_yaml(text: str) -> Any:
    """The plain values of a YAML text.

    Raises:
        ValueError: if it is no YAML, is too long, or its aliases stand for too many values.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"more than {MAX_CHARACTERS} characters, and no recipe needs as many")
    try:
        return yaml.load(text, _BoundedLoader)
    except (
        Exception
    ) as error:  # besides YAMLError, what int(), date() and others raise for a value like 2024-99-99
        raise ValueError(str(error)) from None
