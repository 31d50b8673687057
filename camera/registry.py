"""Interchangeable things by name: families, block formats, data sets, engines, methods.

A thing is one module in its package, which registers it as it is imported. So a new file is found with no other edit,
and another distribution adds its own through the entry-point group `camera`, whose modules are imported as well.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema
from pydantic_core.core_schema import no_info_after_validator_function

from camera.errors import CameraError

if TYPE_CHECKING:
    from camera.formats.format import BlockFormat  # cycle allowed: for types alone
    from camera.quantization.method import Method  # cycle allowed: for types alone

Entry = TypeVar("Entry")
PLUGINS = "camera"
"""The entry-point group of other distributions' modules."""


class Registry(Mapping[str, Entry]):
    """The entries of one kind by name, in the order of the names; its package is imported when first asked."""

    def __init__(self, kind: str, package: str, plugins: str = PLUGINS) -> None:
        """Args:
        kind: what an entry is, for messages: `engine`.
        package: dotted name of the package whose modules register entries.
        plugins: the entry-point group of other distributions' modules.
        """
        self.kind = kind
        self._package = package
        self._plugins = plugins
        self._entries: dict[str, Entry] = {}
        self._loaded = False

    def register(self, name: str, entry: Entry) -> Entry:
        """Add an entry, and give it back.

        Raises:
            ValueError: if the name is another entry's.
        """
        if self._entries.setdefault(name, entry) is not entry:
            raise ValueError(f"two {self.kind}s are called {name}")
        return entry

    # By identity, which brings no package in: an annotation with a registry is hashed when it stands in a union.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __getitem__(self, name: str) -> Entry:
        """Raises CameraError, with the names there are, for one that there is not."""
        entries = self._all()
        if name not in entries:
            raise CameraError(f"unknown {self.kind} {name!r}: known are {', '.join(self)}")
        return entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._all()))

    def __len__(self) -> int:
        return len(self._all())

    def __contains__(self, name: object) -> bool:
        return name in self._all()

    def _all(self) -> dict[str, Entry]:
        if not self._loaded:
            self._loaded = True  # first: a module may ask for another entry while it is imported
            package = import_module(self._package)
            for module in iter_modules(package.__path__, f"{self._package}."):
                import_module(module.name)
            for plugin in entry_points(group=self._plugins):
                import_module(plugin.module)
        return self._entries


@dataclass(frozen=True)
class NameIn:
    """Type of an option that names an entry: `Annotated[str, NameIn(ENGINES)]`. Refused with the names there are; the
    command line lists its choices by it."""

    registry: Registry[Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(self._known, handler(source))

    def _known(self, name: str) -> str:
        if name not in self.registry:
            known = ", ".join(self.registry)
            raise ValueError(f"unknown {self.registry.kind} {name!r}: known are {known}")
        return name


# What option models name. Filled by the modules of the packages; named here, below all of them, so that options and
# packages need not import each other.
DATA_SETS: Registry[Any] = Registry("data set", "camera.data.sets")
ENGINES: Registry[Any] = Registry("engine", "camera.engines")
PRUNING_METHODS: Registry[Any] = Registry("pruning method", "camera.pruning.methods")
BLOCK_FORMATS: "Registry[BlockFormat]" = Registry("block format", "camera.formats.types")
QUANTIZATION_METHODS: "Registry[type[Method]]" = Registry("quantising method", "camera.quantization.methods")
