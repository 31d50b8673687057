"""The recipe: one YAML file that says all of a run."""

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator

from camera.errors import CameraError
from camera.options import (
    BenchmarkOptions,
    BlockType,
    CalibrationOptions,
    CaptureOptions,
    EvaluateOptions,
    Options,
    PruneOptions,
    QuantizeOptions,
)


class TrackingOptions(Options):
    """What MLflow records."""

    enabled: bool = True
    """Off: no MLflow run, and nothing is registered."""
    experiment: str = "camera"
    """The MLflow experiment."""


class PublishOptions(Options):
    """Where the result goes."""

    enabled: bool = True
    """Off: the run ends with the report."""
    folder: Path = Path("published")
    """The model is published as `<folder>/<name>/`."""
    alias: str = "candidate"
    """Alias of the new version in the MLflow registry."""
    dvc: bool = True
    """Version the published folder with DVC, where the folder is inside a DVC repository."""
    remote: str | None = None
    """DVC remote to push to; the default is the repository's default remote."""


class Recipe(Options):
    """All of a run. Relative paths are relative to the directory in which the run starts."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """Name of the published model."""
    model: str
    """The source checkpoint: a folder, or `organisation/name` on the Hugging Face hub."""
    revision: str | None = None
    """For a hub model: the commit."""
    baseline: BlockType = "q4_0"
    """Type of the unpruned model that every table compares with."""
    calibration: CalibrationOptions = CalibrationOptions()
    """The tokens that importance is measured on."""
    capture: CaptureOptions = CaptureOptions()
    """How statistics are gathered."""
    prune: PruneOptions = PruneOptions()
    """Which channels go."""
    quantize: QuantizeOptions = QuantizeOptions()
    """What the pruned model is stored as."""
    evaluate: EvaluateOptions = EvaluateOptions()
    """How quality is measured."""
    benchmark: BenchmarkOptions = BenchmarkOptions()
    """How speed is measured."""
    tracking: TrackingOptions = TrackingOptions()
    """What MLflow records."""
    publish: PublishOptions = PublishOptions()
    """Where the result goes."""
    schema_version: Literal[1] = 1
    """Version of this format."""

    @field_validator("model")
    @classmethod
    def _model_is_given(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("is empty: give a checkpoint folder or a hub id")
        return value


def load_recipe(path: Path, overrides: tuple[str, ...] | list[str] = ()) -> Recipe:
    """Read a recipe, apply `section.key=value` overrides (values are YAML), and check it.

    Raises:
        CameraError: naming the file and the field that is wrong.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise CameraError(f"recipe {path} does not exist; see recipes/ for examples") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CameraError(f"recipe {path} is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise CameraError(f"recipe {path} does not hold a mapping of fields")
    for override in overrides:
        _apply(content, override)
    return check_recipe(content, str(path))


def check_recipe(content: dict[str, Any], where: str) -> Recipe:
    """Make a recipe of plain values.

    Raises:
        CameraError: with one line per wrong field.
    """
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        lines = [f"{where}: {len(error.errors())} field(s) are wrong:"]
        lines += [f"  {_field(entry)}: {_reason(entry)}" for entry in error.errors()]
        raise CameraError("\n".join(lines)) from None


def _field(entry: Any) -> str:
    return ".".join(str(part) for part in entry["loc"]) or "recipe"


def _reason(entry: Any) -> str:
    if entry["type"] == "extra_forbidden":
        known = _fields_at(entry["loc"][:-1])
        return "no such field" + (f"; known here: {', '.join(known)}" if known else "")
    reason = str(entry["msg"]).removeprefix("Value error, ")
    value = entry.get("input")
    return f"{reason} (got {value!r})" if isinstance(value, str | int | float) else reason


def _fields_at(location: tuple[Any, ...]) -> list[str]:
    """The fields of the section at a location of the recipe; none where it is no section of ours."""
    section: Any = Recipe
    for part in location:
        section = getattr(section, "model_fields", {}).get(part)
        section = section.annotation if section is not None else None
    return list(getattr(section, "model_fields", {}))


def _apply(content: dict[str, Any], override: str) -> None:
    key, found, text = override.partition("=")
    if not found or not key:
        raise CameraError(f"--set {override}: write section.key=value, for example --set prune.ratio=0.3")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise CameraError(f"--set {override}: the value is not valid YAML ({error})") from None
    *sections, last = key.split(".")
    place = content
    for section in sections:
        place = place.setdefault(section, {})
        if not isinstance(place, dict):
            raise CameraError(f"--set {override}: {section} is not a section")
    place[last] = value
