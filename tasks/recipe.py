"""The recipe: one YAML file that says all of a run."""

from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError, field_validator, model_validator

from camera.errors import CameraError
from camera.options import (
    BenchmarkOptions,
    BlockType,
    CalibrationOptions,
    CaptureOptions,
    EvaluateOptions,
    Options,
    PositiveInt,
    PruneOptions,
    QuantizeOptions,
    Setting,
    UsedWhen,
)
from camera.presets import PresetName, below
from camera.yaml_text import MAX_CHARACTERS, parse_yaml
from tasks.options import SweepOptions


class TrackingOptions(Options):
    """What MLflow records."""

    enabled: bool = True
    """Off: no MLflow run, and nothing is registered."""
    experiment: str = "camera"
    """The MLflow experiment."""
    parent: str | None = None
    """The MLflow run below which this one is shown; `camera sweep` sets it."""


EVERY_TEXT = "*"
_Limit = Annotated[float, Field(gt=-1, allow_inf_nan=False)]


class RequireOptions(Options):
    """The quality gate: how much worse than the original a model may be and still be published."""

    perplexity_increase: dict[str, _Limit] = Field(default_factory=dict)
    """Largest relative increase of perplexity, pruned and quantised against the original: 0.3 is 30 %. A number
    holds for every text of `evaluate`; a mapping names texts (`{wikitext2-test: 0.3}`), and `*` stands for the others."""
    task_drop: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Largest drop of the average accuracy over the tasks, in points: 2.5 lets 60 % become 57.5 %."""

    @field_validator("perplexity_increase", mode="before")
    @classmethod
    def _a_number_is_for_every_text(cls, value: Any) -> Any:
        return {EVERY_TEXT: value} if isinstance(value, int | float | str) else value

    @model_validator(mode="after")
    def _something_is_required(self) -> "RequireOptions":
        if not self.perplexity_increase and self.task_drop is None:
            raise ValueError("requires nothing: give perplexity_increase or task_drop, or leave require out")
        return self


class BenchmarkHostOptions(Options):
    """Where the benchmark is measured, if not on this machine."""

    deployment: str
    """The Prefect deployment that measures (`benchmark/benchmark-910b1`); its host must share the store."""
    device_name: str
    """What that host calls the device of `benchmark.device`, as `camera doctor` prints it there; the host checks it."""
    start_within: PositiveInt = 3600
    """Seconds until a worker there must begin."""
    finish_within: PositiveInt = 14400
    """Seconds until it must be done."""


class PublishOptions(Options):
    """Where the result goes."""

    enabled: Annotated[bool, Setting] = True
    """Off: the run ends with the report."""
    folder: Path = Path("published")
    """The model is published as `<folder>/<name>/`."""
    alias: str = "candidate"
    """Alias of the new version in the MLflow registry; `production` is given by `camera promote`."""
    dvc: bool = True
    """Version the published folder with DVC, where the folder is inside a DVC repository."""
    remote: str | None = Field(default=None, pattern=r"^[\w.-]+$")
    """DVC remote to push to, by its name in .dvc/config; the default is the repository's default remote."""
    require_signature: Annotated[bool, UsedWhen(lambda asked: asked.require_signature)] = False
    """What is published fails audits and gets no alias until `camera sign` signed it."""
    require: Annotated[RequireOptions | None, Setting] = None
    """The quality gate: a model that fails it is kept and marked, and not published."""

    @field_validator("alias")
    @classmethod
    def _production_is_promoted(cls, value: str) -> str:
        if value == "production":
            raise ValueError(
                "is given by `camera promote`, which audits the model first: choose another alias"
            )
        return value


class Recipe(Options):
    """All of a run. Relative paths are relative to the directory in which the run starts."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """Name of the published model."""
    model: str
    """The source checkpoint: a folder, or `organisation/name` on the Hugging Face hub."""
    revision: str | None = None
    """For a hub model: the commit."""
    preset: Annotated[PresetName | None, Setting] = Field(
        default=None, exclude_if=lambda value: value is None
    )
    """Settings that belong together, for the fields that the recipe does not give: `ascend-reference`, those of the Ascend
    version of CAMERA."""
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
    benchmark_host: Annotated[BenchmarkHostOptions | None, Setting] = None
    """Where speed is measured; the default is this machine."""
    tracking: Annotated[TrackingOptions, Setting] = TrackingOptions()
    """What MLflow records."""
    publish: Annotated[PublishOptions, Setting] = PublishOptions()
    """Where the result goes."""
    sweep: Annotated[SweepOptions | None, Setting] = None
    """Lists of values to try; such a recipe is run by `camera sweep`."""
    schema_version: Literal[1] = 1
    """Version of this format."""

    @model_validator(mode="before")
    @classmethod
    def _a_preset_gives_what_is_not_given(cls, content: Any) -> Any:
        if isinstance(content, dict) and isinstance(name := content.get("preset"), str):
            return below(content, name)
        return content

    @field_validator("model")
    @classmethod
    def _model_is_given(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("is empty: give a checkpoint folder or a hub id")
        return value

    @model_validator(mode="after")
    def _a_device_elsewhere_is_named(self) -> "Recipe":
        if self.benchmark_host is not None and self.benchmark.device == "auto":
            raise ValueError(
                "benchmark_host needs benchmark.device (such as npu): the result is filed under it"
            )
        return self


_ONE_WIDTH = "leave it out: every layer keeps as many channels"
_ONE_METHOD = "was replaced: write `prune.method: camera`, `refit`, or `obs` (which refits as well)"
REPLACED = {
    "benchmark.deployment": "has moved: write `benchmark_host.deployment`",
    "benchmark.device_name": "has moved: write `benchmark_host.device_name`",
    "benchmark.finish_within": "has moved: write `benchmark_host.finish_within`",
    "benchmark.start_within": "has moved: write `benchmark_host.start_within`",
    "benchmark.llama_cpp_reads_q4_0_64": "was removed; leave it out: the build itself is asked, with a tiny model",
    "prune.allocation": f"was removed; {_ONE_WIDTH}",
    "prune.allocation_bound": f"was removed; {_ONE_WIDTH}",
    "prune.allocation_windows": f"was removed; {_ONE_WIDTH}",
    "prune.refit": _ONE_METHOD,
    "prune.score": _ONE_METHOD,
    "prune.sparsity_pattern": "was removed; leave it out: `prune.sparsity` is unstructured",
    "prune.steps": "was removed; leave it out: a model is pruned in one step",
    "quantize.sort_channels": "was removed; leave it out: it made no model better",
}
"""What to write instead of the fields that a recipe had once."""


def load_recipe(path: Path, overrides: tuple[str, ...] | list[str] = ()) -> Recipe:
    """Read a recipe, apply `section.key=value` overrides (values are YAML), and check it.

    Raises:
        CameraError: naming the file and the field that is wrong.
    """
    try:
        with path.open(encoding="utf-8") as file:
            content = parse_yaml(file.read(MAX_CHARACTERS + 1))
    except (FileNotFoundError, IsADirectoryError):
        raise CameraError(f"recipe {path} does not exist; see recipes/ for examples") from None
    except OSError as error:
        raise CameraError(f"recipe {path} cannot be read: {error}") from None
    except ValueError as error:
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
        wrong = [f"  {_field(entry)}: {_reason(entry)}" for entry in error.errors()]
        raise CameraError("\n".join([f"{where}: {len(wrong)} field(s) are wrong:", *wrong])) from None


def wrong_fields(content: dict[str, Any]) -> dict[str, str]:
    """What is wrong with a recipe of plain values: reasons by dotted field; empty if nothing is."""
    try:
        Recipe.model_validate(content)
    except ValidationError as error:
        return {_field(entry): _reason(entry) for entry in error.errors()}
    return {}


def _field(entry: Any) -> str:
    return ".".join(str(part) for part in entry["loc"]) or "recipe"


def _reason(entry: Any) -> str:
    if entry["type"] == "extra_forbidden":
        if (replaced := REPLACED.get(_field(entry))) is not None:
            return replaced
        known = _fields_at(entry["loc"][:-1])
        return "no such field" + (f"; known here: {', '.join(known)}" if known else "")
    reason = str(entry["msg"]).removeprefix("Value error, ")
    value = entry.get("input")
    short = isinstance(value, str | float) or (isinstance(value, int) and value.bit_length() <= 64)
    return f"{reason} (got {value!r})" if short else reason


def _fields_at(location: tuple[Any, ...]) -> list[str]:
    """The fields of the section at a location of the recipe; none where it is no section of ours."""
    section: Any = Recipe
    for part in location:
        if isinstance(part, int):  # an item of a tuple of sections
            section = next(iter(get_args(section)), None)
        else:
            section = getattr(section, "model_fields", {}).get(part)
            section = section.annotation if section is not None else None
            if isinstance(section, UnionType):  # an optional section
                section = next(iter(get_args(section)), None)
    return list(section.known_fields()) if hasattr(section, "known_fields") else []


def _apply(content: dict[str, Any], override: str) -> None:
    key, _, text = override.partition("=")
    if "=" not in override or not key:
        raise CameraError(f"--set {override}: write section.key=value, for example --set prune.ratio=0.3")
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise CameraError(f"--set {override}: the value is not valid YAML: {error}") from None
    try:
        put(content, key, value)
    except ValueError as error:
        raise CameraError(f"--set {override}: {error}") from None


def put(content: dict[str, Any], key: str, value: Any) -> None:
    """Set `section.key` of plain values in place; a mapping that another section may share is copied first.

    Raises:
        ValueError: if the section is no mapping.
    """
    *sections, last = key.split(".")
    place = content
    for section in sections:
        inner = place.get(section) or {}
        if not isinstance(inner, dict):
            raise ValueError(f"{section} is not a section")
        place[section] = dict(inner)  # a copy: a YAML alias may share it with another section
        place = place[section]
    place[last] = value
