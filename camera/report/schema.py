"""The shape of `results.json`."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from camera.benchmark.report import BenchmarkRow
from camera.report.gate import Gate
from camera.results import Result

ModelId = Literal["original", "baseline", "pruned", "pruned+quantized"]
MODEL_IDS: tuple[ModelId, ...] = ("original", "baseline", "pruned", "pruned+quantized")
"""In the order in which tables list them: `baseline` is the original in the baseline's type."""


class Perplexity(Result):
    """Perplexity of one model on one text."""

    value: float
    change: float | None
    """Relative to the original on the same text: 0.05 is 5 % worse. None for want of the original's."""
    tokens: int
    """Scored tokens."""
    window: int
    """Tokens per window."""
    dtype: str
    """What the layers computed in."""


class Change(Result):
    """A model against the original on the same questions."""

    difference: float
    """Mean of (model − original) over questions: −0.02 is two points worse."""
    standard_error: float | None
    """Of that mean."""
    gained: int
    """Questions that only this model answers rightly."""
    lost: int
    """Questions that only the original answers rightly."""
    p_value: float | None = None
    """Exact McNemar test: how likely so uneven a split is if neither is better. None for a mean of tasks."""


class Accuracy(Result):
    """Share of the questions that were answered rightly."""

    value: float
    standard_error: float | None
    p_by_chance: float | None = Field(default=None, exclude_if=lambda value: value is None)
    """How likely so many right answers or more are of one who knows nothing."""
    change: Change | None = None
    """None of the original itself, or for want of its answers to the same questions."""


class TaskScore(Result):
    """One model on one task."""

    documents: int
    """Questions."""
    few_shot: int
    """Examples before each."""
    limit: int | None = None
    """Only so many questions were asked for; None: all."""
    dtype: str
    """What the layers computed in."""
    chance: float | None = Field(default=None, exclude_if=lambda value: value is None)
    """Share that one who knows nothing answers rightly: by guessing, or by always giving the commonest answer."""
    metrics: dict[str, Accuracy]
    """`acc`, and `acc_norm` where the task has it: by likelihood per character."""


class ModelRow(Result):
    """One model: what it is and how well it predicts."""

    id: ModelId
    title: str
    """What people call it: `pruned, q4_0_64`."""
    type: str | None = None
    """Of the matrices: f32, f16, bf16, or a block type."""
    ffn_width: int | None = None
    """FFN channels of every layer; of a mixture of experts those of each expert."""
    experts: int = Field(default=0, exclude_if=lambda value: not value)
    """Of each sparse layer of a mixture of experts."""
    parameters: int | None = None
    bytes: int | None = None
    """Of all weights on disk."""
    bits_per_weight: float | None = None
    """8 · bytes / parameters, whatever is in the file counted."""
    perplexity: dict[str, Perplexity] = Field(default_factory=dict)
    """By the label of the text."""
    tasks: dict[str, TaskScore] = Field(default_factory=dict, exclude_if=lambda value: not value)
    """By the name of the task."""
    samples: dict[str, str] = Field(default_factory=dict, exclude_if=lambda value: not value)
    """What it wrote, by prompt."""
    task_average: dict[str, Accuracy] = Field(default_factory=dict, exclude_if=lambda value: not value)
    """`acc`: mean over tasks. `acc_norm`: the same of that metric where a task has it. Empty where a task is missing."""

    @property
    def task_change(self) -> Change | None:
        """Of the average over tasks, against the original's; None if that is not known."""
        average = self.task_average.get("acc")
        return None if average is None else average.change


class SplitLoss(Result):
    """One way to spend a budget of weights on fewer and on narrower experts."""

    experts_kept: int
    kept: int
    """Channels of each expert that stay."""
    loss: float
    """Estimated: share of the residual stream's energy that goes missing, summed over layers."""


class PruneSummary(Result):
    """What was asked of pruning, and what came out."""

    ratio: float
    """Share of the channels that the recipe asked to remove; where `considered` is filled, of all experts' weights."""
    method: str | None = None
    """Name of the pruning method."""
    mode: str
    """`physical` or `mask`."""
    multiple_of: int
    width: int
    """FFN channels before; of a mixture of experts those of each expert."""
    kept_width: int
    """FFN channels that stay in every layer, or in every expert."""
    removed_share: float
    """Of all channels: what rounding left of the ratio. Of a mixture of experts those of the experts."""
    experts: int = Field(default=0, exclude_if=lambda value: not value)
    """Of each sparse layer, before."""
    experts_kept: int = Field(default=0, exclude_if=lambda value: not value)
    scope: str | None = Field(default=None, exclude_if=lambda value: value is None)
    """Of a mixture of experts: `expert` or `layer`, what channels were ranked within."""
    considered: tuple[SplitLoss, ...] = Field(default=(), exclude_if=lambda value: not value)
    """What `experts: auto` chose from, the chosen one first."""
    reduce_ratio: float | None = None
    """CAMERA's α."""
    propagate: str | None = None
    """`one-shot` or `sequential`."""
    calibration_samples: int | None = None
    calibration_tokens: int | None = None


class LayerImportance(Result):
    """Importance of the micro-experts of one decoder layer, and which of them stay."""

    layer: int
    quartiles: tuple[float, ...]
    """Minimum, first quartile, median, third quartile, maximum."""
    curve: tuple[float, ...]
    """Importance from the highest to the lowest, at 64 evenly spaced ranks or fewer."""
    kept_importance: float | None = None
    """Share of the layer's importance that the kept channels hold."""
    kept_bins: tuple[float, ...] = ()
    """Share of channels kept in each of 256 or fewer equal stretches of the channel numbers."""


class LayerDamage(Result):
    """What pruning one decoder layer cost its FFN output, on calibration tokens that no refit was fitted to."""

    layer: int
    step: int = 1
    """Always 1; results of older versions may have been pruned in several."""
    plain: float
    """Share of the output's energy that CAMERA's choice loses, without a refit."""
    kept: float
    """The same of what was kept."""
    refitted: bool


class LayerExperts(Result):
    """The experts of one sparse layer."""

    layer: int
    tokens: tuple[int, ...]
    """Calibration tokens that the original's router sends to each."""
    energy: tuple[float, ...]
    """Share of each in the energy of what all put out."""
    kept: tuple[int, ...]
    """Channels of each that stay; 0 where the expert was dropped. Empty where nothing was pruned."""
    ranked_by_weights: dict[str, int] = Field(default_factory=dict)
    """Networks that too few tokens visited to rank their channels by, with the tokens."""


class TypeTotal(Result):
    """All tensors of one type in a quantised model."""

    type: str
    tensors: int
    parameters: int
    bytes: int


class FallBack(Result):
    """A tensor that could not be stored in the type that was asked for."""

    tensor: str
    stored: str
    """The type it has."""
    reason: str


class Quantization(Result):
    """What a quantised model is made of."""

    model: ModelId
    relative_error: float
    """RMS of (stored − original) over RMS of the original, over all matrices."""
    types: tuple[TypeTotal, ...]
    """Largest first."""
    fall_backs: tuple[FallBack, ...]


class Device(Result):
    """Where speed was measured."""

    name: str
    kind: str
    threads: int | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    bandwidth_bytes_per_second: float | None = None


class Results(Result):
    """All that is known of a run. A part that did not run is empty, and `missing` names it."""

    name: str
    base_model: str
    model_type: str
    layers: int
    hidden_size: int
    recipe: dict[str, Any]
    """As it was run; of absolute paths only the last part."""
    models: tuple[ModelRow, ...]
    prune: PruneSummary | None = None
    importance: tuple[LayerImportance, ...] = ()
    damage: tuple[LayerDamage, ...] = Field(default=(), exclude_if=lambda value: not value)
    """Where pruning measured it."""
    experts: tuple[LayerExperts, ...] = Field(default=(), exclude_if=lambda value: not value)
    """Of a mixture of experts: its sparse layers."""
    quantization: tuple[Quantization, ...] = ()
    benchmark: tuple[BenchmarkRow, ...] = ()
    """With `model` being a title of `models` wherever it is one of them."""
    benchmark_baseline: str | None = None
    """The title that speed is compared with."""
    device: Device | None = None
    gate: Gate | None = None
    """What the recipe required of the product, and whether it was met; None if nothing was required."""
    missing: tuple[str, ...] = ()
    """The parts that the run did not have, in words."""
    schema_version: Literal[1] = 1

    def row(self, model: ModelId) -> ModelRow | None:
        """The row of a model, if it is there."""
        return next((row for row in self.models if row.id == model), None)

    @property
    def product(self) -> ModelRow | None:
        """The model that the run was for: quantised if it is, else pruned."""
        return self.row("pruned+quantized") or self.row("pruned")

    @property
    def datasets(self) -> tuple[str, ...]:
        """Labels of all texts, in the order of the recipe's evaluations."""
        return tuple(dict.fromkeys(label for row in self.models for label in row.perplexity))

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of all tasks, in the recipe's order."""
        return tuple(dict.fromkeys(task for row in self.models for task in row.tasks))


def read_results(path: Path) -> Results:
    """Read a `results.json`.

    Raises:
        CameraError: if it is missing, or is not one.
    """
    return Results.read(path, "make the report again")
