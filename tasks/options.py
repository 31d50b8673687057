"""Options of the pipeline's own: the sections that a step is asked with, and what a sweep varies."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, field_validator, model_validator

from camera.options import BlockType, NotEmpty, Options, PositiveInt
from camera.registry import QUANTIZATION_METHODS, NameIn

Section = TypeVar("Section", bound=Options)


class Sections(dict[str, Options]):
    """Sections of options by name: `Sections(capture=CaptureOptions())`."""

    def of(self, kind: type[Section]) -> Section:
        """The section of this type.

        Raises:
            KeyError: if there is none.
        """
        for section in self.values():
            if isinstance(section, kind):
                return section
        raise KeyError(kind.__name__)

    def identity(self) -> dict[str, Any]:
        """What of every section decides the result, as JSON has it."""
        return {name: section.identity() for name, section in self.items()}


VARIABLE_SECTIONS = ("calibration", "capture", "prune", "quantize")
"""What makes a model may vary; what measures it may not, for measurements must be comparable."""
_SHORT = {
    "ratios": "prune.ratio",
    "reduce_ratios": "prune.reduce_ratio",
    "types": "quantize.type",
    "methods": "quantize.method",
}


class SweepOptions(Options):
    """Lists of values; every combination of them is a member, and each member is a whole run of the recipe."""

    ratios: NotEmpty[float] = ()
    """Values of `prune.ratio`."""
    reduce_ratios: NotEmpty[float] = ()
    """Values of `prune.reduce_ratio`."""
    types: NotEmpty[BlockType] = ()
    """Values of `quantize.type`."""
    methods: NotEmpty[Annotated[str, NameIn(QUANTIZATION_METHODS)]] = ()
    """Values of `quantize.method`."""
    grid: dict[str, NotEmpty[Any]] = Field(default_factory=dict)
    """Values of any other `section.field` of what makes a model: `{capture.propagate: [one-shot, sequential]}`."""
    publish: Literal["none", "best", "all"] = "none"
    """Which members are published: `best` is the smallest that meets `publish.require`."""
    workers: PositiveInt = 1
    """Members at work at once. With more than one, speeds are measured beside other work."""
    deployment: str | None = None
    """Run the members by this Prefect deployment of `compress`, on workers that share the store."""

    @field_validator("grid")
    @classmethod
    def _only_what_makes_a_model(cls, value: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
        for key in value:
            section, _, field = key.partition(".")
            if section not in VARIABLE_SECTIONS or not field or "." in field:
                raise ValueError(
                    f"{key} cannot vary: name a field of {', '.join(VARIABLE_SECTIONS)}, as in prune.multiple_of"
                )
        return value

    @model_validator(mode="after")
    def _something_varies_once(self) -> "SweepOptions":
        if not self.axes:
            raise ValueError(f"varies nothing: give a list, one of {', '.join(_SHORT)} or grid")
        for short, key in _SHORT.items():
            if getattr(self, short) and key in self.grid:
                raise ValueError(f"{short} and grid.{key} are the same: keep one")
        for axis, (where, values) in self.axes.items():
            repeated = next((value for index, value in enumerate(values) if value in values[:index]), None)
            if repeated is not None:
                raise ValueError(f"{where} gives {axis} the value {repeated!r} twice")
        return self

    @property
    def axes(self) -> Mapping[str, tuple[str, tuple[Any, ...]]]:
        """By the recipe's field: where it is written in this section, and its values."""
        found = {key: (short, values) for short, key in _SHORT.items() if (values := getattr(self, short))}
        return found | {key: (f"grid.{key}", values) for key, values in self.grid.items()}
