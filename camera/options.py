"""The options of every stage: frozen, described, checked when they are made.

A recipe is made of these sections, and the command line fills them from its flags, so that there is one
place where a default or a limit is written.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from camera.registry import BLOCK_FORMATS, DATA_SETS, ENGINES, PRUNING_METHODS, QUANTIZATION_METHODS, NameIn

DTypeName = Literal["auto", "float32", "bfloat16", "float16"]
BlockType = Annotated[str, NameIn(BLOCK_FORMATS)]
PositiveInt = Annotated[int, Field(gt=0)]
Item = TypeVar("Item")
Section = TypeVar("Section", bound="Options")


def _some(items: tuple[Item, ...]) -> tuple[Item, ...]:
    if not items:
        raise ValueError("is empty: give at least one")
    return items


NotEmpty = Annotated[tuple[Item, ...], AfterValidator(_some)]


class Setting:
    """Marks a field that says how the work is done: memory and speed depend on it, the result does not."""


@dataclass(frozen=True)
class UsedWhen:
    """Marks a field that decides the result only where others of its section have certain values."""

    used: Callable[[Any], bool]
    """Given the section."""


class LaterStage:
    """Marks a field that only a later stage reads: the result of the section's own stage does not depend on it."""


class Options(BaseModel):
    """Base of all option sections: immutable, and an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=()
    )

    def identity(self) -> dict[str, Any]:
        """The fields that decide the result, as JSON has them. A field without a mark is one: a forgotten mark makes
        work again, never a wrong answer from the cache."""
        return self.model_dump(
            mode="json", exclude=self._marked(Setting) | self._marked(LaterStage) | self._unused()
        )

    def execution(self) -> dict[str, Any]:
        """The fields marked as a `Setting`, as JSON has them."""
        return self.model_dump(mode="json", include=self._marked(Setting))

    def fields_of(self, kind: "type[Options]") -> dict[str, Any]:
        """The values of the fields that another section has as well."""
        return {name: getattr(self, name) for name in kind.model_fields if name in type(self).model_fields}

    @classmethod
    def known_fields(cls) -> dict[str, FieldInfo]:
        """The fields by name, those that other modules add among them."""
        return dict(cls.model_fields)

    @classmethod
    def _marked(cls, mark: type) -> set[str]:
        return {
            name
            for name, field in cls.model_fields.items()
            if any(each is mark or isinstance(each, mark) for each in field.metadata)
        }

    def _unused(self) -> set[str]:
        return {
            name
            for name, field in type(self).model_fields.items()
            for mark in field.metadata
            if isinstance(mark, UsedWhen) and not mark.used(self)
        }


class DatasetOptions(Options):
    """Where text comes from."""

    name: Annotated[str, NameIn(DATA_SETS)] = "stdlib"
    """`stdlib` (doc strings of the running Python), `wikitext2` or `c4` (from the hub or a local copy), or `file`."""
    path: Annotated[Path | None, Setting] = None
    """For `file`: a .txt, .jsonl, .parquet file or a folder of them, or a .safetensors file with `input_ids`. For `wikitext2`
    and `c4`: a local copy of the file, or of the hub's folder. What it holds decides the result, and not where it lies."""
    split: Literal["train", "test"] = "train"
    """Which part to read. Calibrate on `train`, measure on `test`. A `file` has one part and ignores this."""
    field: Annotated[str, UsedWhen(lambda asked: asked.path is not None)] = "text"
    """For .jsonl and .parquet: the field that holds the text."""
    revision: str | None = None
    """For hub datasets: the commit to read; the default is the one pinned in camera/data/sets/hub.py."""

    @model_validator(mode="after")
    def _a_path_where_there_must_be_one(self) -> "DatasetOptions":
        # Defaults need no check: they are made before any data set can be asked.
        if self.model_fields_set & {"name", "path"}:
            asked = DATA_SETS[self.name]
            if asked.needs_path and self.path is None:
                raise ValueError(f"name `{self.name}` needs a path")
            if not asked.takes_path and self.path is not None:
                raise ValueError(f"name `{self.name}` takes no path: a text of your own is name `file`")
        return self


class CalibrationOptions(DatasetOptions):
    """The tokens that importance is measured on."""

    samples: PositiveInt = 128
    """How many windows of tokens."""
    length: PositiveInt = 2048
    """Tokens in a window."""
    seed: int = 0
    """Seed of the random choice of windows."""


class CaptureOptions(Options):
    """How the statistics of the feed-forward activations are gathered."""

    propagate: Literal["one-shot", "sequential"] = "sequential"
    """`one-shot`: statistics of the original model. `sequential`: layer i sees the already pruned layers below."""
    batch_size: Annotated[PositiveInt, Setting] = 8
    """Samples that go through a layer at once. Changes memory and speed, not the result."""
    dtype: DTypeName = "auto"
    """What the layers compute in; `auto` is the checkpoint's own. Statistics are always float64 sums."""
    device: Annotated[str, Setting] = "auto"
    """`auto` (npu, else cuda, else cpu), `cpu`, `cuda[:N]` or `npu[:N]`."""
    devices: Annotated[PositiveInt, Setting] = 1
    """Split the samples over so many processes: one accelerator each, or shares of the CPU's cores."""


def _share_or_auto(value: Any) -> Any:
    try:
        return value if value == "auto" else float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{value!r} is neither `auto` nor a share such as 0.25") from None


class PruneOptions(Options):
    """Which feed-forward channels go."""

    ratio: float = Field(default=0.2)
    """Share of each layer's FFN channels to remove: at least 0 and below 1."""
    reduce_ratio: float = Field(default=0.95, ge=0, le=1)
    """CAMERA's alpha: weight of the largest activation against the sum of squares."""
    mode: Literal["physical", "mask"] = "physical"
    """`physical` slices the matrices; `mask` writes zeros and keeps the shapes."""
    multiple_of: PositiveInt = 64
    """The kept width is rounded up to a multiple of this (int4 on the NPU wants 64). With mode `mask` the default is 1: no
    matrix gets narrower, and exactly int(F · ratio) channels go, as in the reference."""
    method: Annotated[str, NameIn(PRUNING_METHODS)] = "camera"
    """`camera` keeps the channels of the highest importance; `refit` also refits each down projection to them, by least
    squares on the calibration tokens; `obs` chooses by what the other channels can compensate for, and refits."""
    damping: Annotated[float | None, UsedWhen(lambda options: options.method != "camera")] = Field(
        default=None, gt=0, le=10
    )
    """`refit`, `obs`: share of the mean second moment added to each channel's own; more trusts the calibration less. The
    default is of 0.001 to 1 what is best on held-back tokens, and 0.1 for experts, which few tokens visit."""
    target: Annotated[Literal["source", "layer"], UsedWhen(lambda options: options.method != "camera")] = (
        "source"
    )
    """`refit`, `obs`: what a layer is fitted to. `source`: its hidden states in the unpruned model, so that errors do not add
    up over layers; `layer`: what the layer itself puts out before it is pruned, as always where the model has experts or
    `capture.propagate` is `one-shot`."""
    round: Annotated[PositiveInt | None, UsedWhen(lambda options: options.method == "obs")] = None
    """`obs`: channels removed before weights and costs are updated; the default is a 64th of the width."""
    experts: Annotated[float | Literal["auto"], BeforeValidator(_share_or_auto)] = Field(
        default=0.0, exclude_if=lambda value: value == 0
    )
    """Mixture of experts: share of each layer's experts to drop whole, those that put out the least, before channels go; or
    `auto`, which takes `ratio` as the share of all their weights and splits it between experts and channels."""
    scope: Literal["expert", "layer"] = Field(default="expert", exclude_if=lambda value: value == "expert")
    """Mixture of experts: `expert` keeps equally many channels of each, its own choice, which every loader reads; `layer`
    ranks all channels of a layer together as CAMERA does, which only mode `mask` can write."""
    sparsity: float = Field(default=0.0, ge=0, lt=1)
    """Share of the feed-forward weights that stay to set to zero, in every row those that Wanda's metric calls least."""

    @field_validator("ratio")
    @classmethod
    def _something_must_stay(cls, value: float) -> float:
        if not value < 1:
            raise ValueError(f"{value} is not below 1: it is a share of the channels, 0.2 removes 20 %")
        if value < 0:
            raise ValueError(f"{value} is below 0: it is the share of channels to remove")
        return value

    @field_validator("experts")
    @classmethod
    def _some_experts_must_stay(cls, value: float | str) -> float | str:
        if isinstance(value, float) and not 0 <= value < 1:
            raise ValueError(f"{value} is not at least 0 and below 1: 0.25 drops a quarter of the experts")
        return value

    @model_validator(mode="before")
    @classmethod
    def _a_mask_rounds_nothing(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("mode") == "mask":
            return {"multiple_of": 1, **given}
        return given

    @model_validator(mode="after")
    def _only_a_mask_has_other_widths(self) -> "PruneOptions":
        if self.scope == "layer" and (self.mode != "mask" or self.method != "camera"):
            raise ValueError(
                "scope `layer` goes with mode `mask` and method `camera`: nothing loads experts of several widths"
            )
        if self.mode == "mask" and self.experts:
            raise ValueError(
                "mode `mask` cannot drop experts, a router has no zeros for them: leave experts out"
            )
        return self


class QuantizeOptions(Options):
    """What each matrix is stored as."""

    type: BlockType = "q4_0_64"
    """Type of the matrices: `q4_0_64` for the Ascend 910B, `q4_0` for any stock llama.cpp."""
    output_type: BlockType | None = None
    """Type of the output head; the default is `type` (llama-quantize's --pure), so that sizes compare fairly."""
    embedding_type: BlockType | None = None
    """Type of the token embedding; the default is `type`."""
    overrides: dict[str, BlockType] = Field(default_factory=dict)
    """Types by tensor: shell patterns on Hugging Face names (`*.down_proj.weight`), last match wins."""
    twin: Annotated[Literal["q4_0"] | None, LaterStage] = None
    """Also write the lossless Q4_0 twin of a Q4_0_64 GGUF, which any stock llama.cpp runs."""
    method: Annotated[
        str,
        NameIn(QUANTIZATION_METHODS),
        UsedWhen(lambda options: QUANTIZATION_METHODS[options.method].calibrates),
    ] = "rtn"
    """How 4-bit blocks are rounded: `rtn` to the nearest, `search` with the best scales for the calibration tokens,
    `gptq` so that later columns make good the errors of earlier ones. All give the same formats at the same size."""
    damping: Annotated[
        float, UsedWhen(lambda options: "damping" in QUANTIZATION_METHODS[options.method].uses)
    ] = Field(default=0.01, gt=0, le=1)
    """`gptq`: share of the mean second moment added to each input's own; more trusts the calibration less."""
    target_bpw: Annotated[float | None, UsedWhen(lambda options: options.target_bpw is not None)] = Field(
        default=None, gt=0
    )
    """Bits per weight of the whole model: matrices whose rounding costs the most on the calibration tokens get finer
    types than `type`, as many as fit. Overrides, `output_type` and `embedding_type` stay as given."""
    batch_size: Annotated[PositiveInt, Setting] = 8
    """Calibration: samples that go through a layer at once. Changes memory and speed, not the result."""
    dtype: Annotated[DTypeName, UsedWhen(lambda options: options.calibrates)] = "float32"
    """Calibration: what the layers compute in; `auto` is the checkpoint's own."""
    device: Annotated[str, Setting] = "auto"
    """Where rounding to the nearest and calibration compute, as in capture; bytes rounded to the nearest are the same everywhere."""

    @property
    def calibrates(self) -> bool:
        """Whether calibration tokens decide anything."""
        return QUANTIZATION_METHODS[self.method].calibrates or self.target_bpw is not None

    @model_validator(mode="after")
    def _a_target_needs_finer_types(self) -> "QuantizeOptions":
        if self.target_bpw is not None and not BLOCK_FORMATS[self.type].in_mixtures:
            known = ", ".join(name for name, form in BLOCK_FORMATS.items() if form.in_mixtures)
            raise ValueError(f"target_bpw goes with type {known}: {self.type} has no finer one")
        return self

    @model_validator(mode="after")
    def _a_twin_is_of_q4_0_64(self) -> "QuantizeOptions":
        if self.twin is not None and self.type != "q4_0_64":
            raise ValueError(f"a twin is of type q4_0_64, and type is {self.type}: leave twin out")
        return self


class PerplexityOptions(Options):
    """How perplexity is measured."""

    window: PositiveInt = 2048
    """Tokens per window; never more than the model's positions."""
    max_windows: PositiveInt | None = None
    """Read only so many windows of each text; the default is all."""
    batch_size: Annotated[PositiveInt, Setting] = 4
    """Windows, or answers of tasks, computed at once."""
    dtype: DTypeName = "auto"
    """What the layers compute in; `auto` is the checkpoint's own."""
    device: Annotated[str, Setting] = "auto"
    """As in capture. A result holds the device's kind."""
    layer_by_layer: Annotated[bool | None, Setting] = Field(
        default=None, exclude_if=lambda value: value is None
    )
    """Run the model layer by layer, with the weights of one layer in memory; the default is to on the CPU, and on an
    accelerator where they take more than half of its free memory."""


class TaskOptions(Options):
    """How accuracy is measured on tasks."""

    few_shot: int = Field(default=0, ge=0, exclude_if=lambda value: value == 0)
    """`tasks`: examples before each question."""
    limit: PositiveInt | None = Field(default=None, exclude_if=lambda value: value is None)
    """`tasks`: ask only the first so many questions of each; the default is all."""
    batch_size: Annotated[PositiveInt, Setting] = 4
    """Windows, or answers of tasks, computed at once."""
    dtype: DTypeName = "auto"
    """What the layers compute in; `auto` is the checkpoint's own."""
    device: Annotated[str, Setting] = "auto"
    """As in capture."""
    layer_by_layer: Annotated[bool | None, Setting] = Field(
        default=None, exclude_if=lambda value: value is None
    )
    """Run the model layer by layer, with the weights of one layer in memory; the default is to on the CPU, and on an
    accelerator where they take more than half of its free memory."""


class EvaluateOptions(TaskOptions, PerplexityOptions):
    """How quality is measured: perplexity on texts, and accuracy on tasks."""

    datasets: NotEmpty[DatasetOptions] = (DatasetOptions(split="test"),)
    """The held-out texts."""
    tasks: tuple[str, ...] = Field(default=(), exclude_if=lambda value: not value)
    """Tasks of lm-eval, such as boolq, openbookqa, rte, arc_easy, winogrande, hellaswag, arc_challenge, piqa, mathqa."""
    task_dtype: DTypeName | None = Field(default=None, exclude_if=lambda value: value is None)
    """`tasks`: what the layers compute in for them, where that is not `dtype`. Of no effect without tasks."""
    samples: int = Field(default=0, ge=0, exclude_if=lambda value: value == 0)
    """Let each model write so many tokens after each of a few fixed prompts, for people to read; it is in memory whole."""
    task_folder: Path | None = Field(default=None, exclude_if=lambda value: value is None)
    """`tasks`: folder of `<task>.<split>.jsonl` files to read instead of the hub."""

    @field_validator("tasks")
    @classmethod
    def _each_task_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if twice := sorted({name for name in value if value.count(name) > 1}):
            raise ValueError(f"names {', '.join(twice)} more than once")
        if wrong := [name for name in value if not re.fullmatch(r"[\w.-]+", name)]:
            raise ValueError(f"{wrong[0]!r} is no name of a task")
        return value

    @model_validator(mode="after")
    def _settings_of_tasks_need_tasks(self) -> "EvaluateOptions":
        for name in ("few_shot", "limit", "task_folder"):
            if not self.tasks and getattr(self, name) not in (0, None):
                raise ValueError(f"{name} goes with tasks, and none is named")
        return self

    @property
    def on_tasks(self) -> dict[str, Any]:
        """The fields of `TaskOptions`."""
        return self.fields_of(TaskOptions) | {"dtype": self.task_dtype or self.dtype}


class BenchmarkOptions(Options):
    """Which engines are timed, on which lengths. An engine's own options are further fields of this section."""

    model_config = ConfigDict(extra="allow")

    engines: NotEmpty[Annotated[str, NameIn(ENGINES)]] = ("torch",)
    """`torch` runs in this process; `llama.cpp` runs your `llama-bench`, else the build in the extra `llama`."""
    prompt: PositiveInt = 4
    """Prompt tokens of the prefill."""
    decode: NotEmpty[PositiveInt] = (256, 512, 1024)
    """Numbers of tokens to decode after the prompt, one row each."""
    repeats: PositiveInt = 5
    """Timed runs per row, alternating between the models."""
    threads: PositiveInt | None = None
    """CPU threads; the default is the engine's own choice."""
    device: Annotated[str, Setting] = "auto"
    """As in capture. A result holds the device's kind and name."""

    @classmethod
    def known_fields(cls) -> dict[str, FieldInfo]:
        """The fields by name, those of every engine among them."""
        own = (engine.options.model_fields for engine in ENGINES.values())
        return {**cls.model_fields, **{name: field for fields in own for name, field in fields.items()}}

    @model_validator(mode="after")
    def _other_fields_are_an_engines(self) -> "BenchmarkOptions":
        if given := self.model_extra:
            known = self.known_fields()
            Options.model_validate({name: given[name] for name in given if name not in known})  # refuses them
            for engine in ENGINES.values():
                given.update(self.of(engine.options).model_dump(include=set(given)))
        return self

    def of(self, kind: type[Section]) -> Section:
        """An engine's own options, of the kind that the engine names."""
        given = self.model_extra or {}
        return kind.model_validate({name: given[name] for name in given if name in kind.model_fields})

    def identity(self) -> dict[str, Any]:
        """As of every section; the engines' own options count for those that are timed."""
        found = self.model_dump(mode="json", exclude={*self._marked(Setting), *(self.model_extra or {})})
        for engine in self.engines:
            found |= self.of(ENGINES[engine].options).identity()
        return found

    def execution(self) -> dict[str, Any]:
        """As of every section, the engines' own settings among them."""
        found = super().execution()
        for engine in self.engines:
            found |= self.of(ENGINES[engine].options).execution()
        return found


def _named_device(name: str) -> str:
    if not re.fullmatch(r"(npu|cuda)(:\d+)?|cpu", name):
        raise ValueError(f"{name!r} is none of npu, npu:N, cuda, cuda:N, cpu")
    return name


class CheckOptions(Options):
    """What of a device is checked."""

    device: Annotated[str, AfterValidator(_named_device)] = "npu"
    """`npu[:N]`, `cuda[:N]` or `cpu`."""
    model: Path | None = None
    """A checkpoint of openPangu-7B: the recipe for the 910B is run on it, and the one with the reference's settings."""
    llama_cpp: Path | None = None
    """Folder that holds a llama-bench which reads Q4_0_64."""
    llama_cpp_stock: Path | None = None
    """Folder that holds a llama-bench as published."""
    quick: bool = False
    """A few minutes: the same shapes, fewer layers, tokens and repeats."""
    tiny: bool = False
    """Small shapes: what works, not how fast."""
    again: tuple[str, ...] = ()
    """A step to run again though it has passed."""

    @property
    def kind(self) -> str:
        """`npu`, `cuda` or `cpu`."""
        return self.device.partition(":")[0]

    @model_validator(mode="after")
    def _can_be_done(self) -> "CheckOptions":
        if self.quick and self.tiny:
            raise ValueError("quick and tiny: give one of them")
        for name in ("model", "llama_cpp", "llama_cpp_stock"):
            path = getattr(self, name)
            if path is not None and not path.is_dir():
                raise ValueError(f"{name}: {path} is no folder")
        return self
