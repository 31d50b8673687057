"""What a run found, gathered from the folders of its stages: the one source of report, table, CSV and model card.

It holds no time, no path of the machine and no run id, so that the same artifacts give the same bytes.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from camera.benchmark.report import BenchmarkReport, BenchmarkRow
from camera.checkpoints.checkpoint import Checkpoint
from camera.devices import dtype_name
from camera.files import read_json
from camera.formats.quantized_model import SUMMARY_NAME, QuantizeReport, TensorRecord
from camera.models import family_of
from camera.pruning.summary import SUMMARY
from camera.report.layers import layer_damage, layer_experts, layer_importance
from camera.report.schema import (
    MODEL_IDS,
    Device,
    FallBack,
    ModelId,
    ModelRow,
    PruneSummary,
    Quantization,
    Results,
    TypeTotal,
)
from camera.report.scores import perplexities, samples, task_scores, with_averages

_SHORT_DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_QUANTIZED: dict[ModelId, str] = {"baseline": "quantized/baseline", "pruned+quantized": "quantized"}


@dataclass(frozen=True)
class RunFolders:
    """What a run was and where its stages wrote."""

    recipe: Mapping[str, Any]
    source: Checkpoint
    folders: Mapping[str, Path]
    """By part: a key of `PARTS`, `evaluate/<model>/<text>`, `task/<model>/<task>` or `sample/<model>`."""

    @property
    def titles(self) -> dict[ModelId, str]:
        """What tables call the four models."""
        return {
            "original": "original",
            "baseline": f"unpruned, {self.recipe.get('baseline', 'q4_0')}",
            "pruned": "pruned",
            "pruned+quantized": f"pruned, {self.recipe.get('quantize', {}).get('type', 'quantised')}",
        }

    def title(self, label: str) -> str:
        """The title of a benchmark's model: the stage labels models by id; any other label is a title already."""
        return next((title for model, title in self.titles.items() if model == label), label)


@dataclass(frozen=True)
class Part:
    """What the folder of one stage adds to the results."""

    words: str
    """What is missing without it."""
    gather: Callable[[RunFolders], dict[str, Any]] = lambda run: {}
    """The fields of `Results` that it fills; called where the folder is there."""


def collect_results(
    *, name: str, recipe: dict[str, Any], folders: Mapping[str, Path], source: Checkpoint
) -> Results:
    """Gather the results of a run.

    Args:
        name: of the published model.
        recipe: what was run, as plain JSON.
        folders: what the stages wrote, by the parts of `PARTS`, and `evaluate/<model>/<text>`, `task/<model>/<task>`
            and `sample/<model>` with a model of `MODEL_IDS`. A part that is not there is missing from the results, and they say so.
        source: the source model.

    Raises:
        CameraError: if a folder that is given does not hold what its stage writes.
    """
    run = RunFolders(recipe, source, folders)
    fields: dict[str, Any] = {}
    for key, part in PARTS.items():
        if key in folders:
            fields |= part.gather(run)
    rows = with_averages(_model_rows(run))
    missing = [f"{part.words} ({key})" for key, part in PARTS.items() if key not in folders]
    if not any(row.perplexity for row in rows):
        missing.append("perplexity (evaluate)")
    return Results(
        name=name,
        base_model=_without_folders(str(recipe.get("model", "the source model"))),
        model_type=str(source.config.get("model_type", "")),
        layers=source.layer_count,
        hidden_size=source.hidden_size,
        recipe=_without_folders(recipe),
        models=tuple(rows),
        missing=tuple(missing),
        **fields,
    )


def _model_rows(run: RunFolders) -> list[ModelRow]:
    """A row for every model of which anything is known."""
    facts: dict[ModelId, dict[str, Any]] = {}
    if "saved" in run.folders:
        saved = Checkpoint.open(run.folders["saved"])
        facts["original"] = _checkpoint_facts(run.source)
        facts["pruned"] = _checkpoint_facts(saved)
    for model, part in _QUANTIZED.items():
        if part in run.folders:
            facts[model] = _quantized_facts(run.folders[part])
    perplexity, tasks = perplexities(run.folders), task_scores(run.folders)
    written = samples(run.folders)
    return [
        ModelRow(
            id=model,
            title=run.titles[model],
            perplexity=perplexity.get(model, {}),
            tasks=tasks.get(model, {}),
            samples=written.get(model, {}),
            **facts.get(model, {}),
        )
        for model in MODEL_IDS
        if model in facts or model in perplexity or model in tasks
    ]


def _checkpoint_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    infos = checkpoint.needed.values()
    parameters = sum(prod(info.shape) for info in infos)
    size = sum(info.size_bytes for info in infos)
    dtype = dtype_name(checkpoint.dtype)
    return {
        "type": _SHORT_DTYPES.get(dtype, dtype),
        "ffn_width": checkpoint.ffn_width,
        "experts": checkpoint.expert_count,
        "parameters": parameters,
        "bytes": size,
        "bits_per_weight": 8 * size / parameters,
    }


def _quantized_facts(folder: Path) -> dict[str, Any]:
    report = QuantizeReport.read(folder / SUMMARY_NAME, "quantize again")
    config = read_json(folder / "config.json")
    family = family_of(config)
    return {
        "ffn_width": family.ffn_width(config),
        "experts": 0 if family.experts is None else family.experts.count(config),
        **report.model_dump(include={"type", "parameters", "bytes", "bits_per_weight"}),
    }


def _pruned(run: RunFolders) -> dict[str, Any]:
    summary = read_json(run.folders["pruned"] / SUMMARY)
    captured = read_json(run.folders["capture"] / "capture.json") if "capture" in run.folders else {}
    scored = read_json(run.folders["scores"] / "scores.json") if "scores" in run.folders else {}
    wanted = ("ratio", "mode", "multiple_of", "width", "kept_width", "removed_share")
    known = ("method", "experts", "experts_kept", "scope", "considered")
    prune = PruneSummary(
        **{key: summary[key] for key in wanted},
        **{key: summary[key] for key in known if key in summary},
        reduce_ratio=scored.get("reduce_ratio"),
        propagate=captured.get("propagate"),
        calibration_samples=captured.get("samples"),
        calibration_tokens=captured.get("tokens"),
    )
    return {"prune": prune, "damage": layer_damage(run.folders["pruned"])}


def _scores(run: RunFolders) -> dict[str, Any]:
    pruned = run.folders.get("pruned")
    scores, count = run.folders["scores"], run.source.layer_count
    return {
        "importance": layer_importance(scores, pruned, count),
        "experts": layer_experts(scores, pruned, run.source),
    }


def _quantized(run: RunFolders) -> dict[str, Any]:
    models = [(model, run.folders[part]) for model, part in _QUANTIZED.items() if part in run.folders]
    return {"quantization": tuple(_quantization(model, folder) for model, folder in models)}


def _quantization(model: ModelId, folder: Path) -> Quantization:
    report = QuantizeReport.read(folder / SUMMARY_NAME, "quantize again")
    by_type: dict[str, list[TensorRecord]] = defaultdict(list)
    for record in report.tensors:
        by_type[record.type].append(record)
    totals = [
        TypeTotal(
            type=type,
            tensors=len(records),
            parameters=sum(record.parameters for record in records),
            bytes=round(sum(record.parameters * record.bits_per_weight / 8 for record in records)),
        )
        for type, records in by_type.items()
    ]
    return Quantization(
        model=model,
        relative_error=report.relative_error,
        types=tuple(sorted(totals, key=lambda total: (-total.bytes, total.type))),
        fall_backs=tuple(
            FallBack(tensor=name, stored=type, reason=reason) for name, type, reason in report.fallback_lines
        ),
    )


def _benchmark(run: RunFolders) -> dict[str, Any]:
    report = BenchmarkReport.read(run.folders["benchmark"] / "benchmark.json", "run the benchmark again")

    def row(measured: BenchmarkRow) -> BenchmarkRow:
        failure = None
        if measured.failure is not None:
            failure = _KEY.sub("its artifact", _without_folders(measured.failure))
        return measured.model_copy(update={"model": run.title(measured.model), "failure": failure})

    return {
        "benchmark": tuple(row(measured) for measured in report.rows),
        "benchmark_baseline": None if report.baseline is None else run.title(report.baseline),
        "device": Device(
            name=str(report.device.get("name", "unknown")),
            kind=str(report.device.get("kind", "unknown")),
            threads=report.options["threads"] or report.device.get("threads"),
            versions=report.versions,
            bandwidth_bytes_per_second=report.bandwidth_bytes_per_second,
        ),
    }


PARTS = {
    "capture": Part("the calibration statistics"),
    "scores": Part("the importance scores", _scores),
    "pruned": Part("the prune summary", _pruned),
    "saved": Part("the pruned checkpoint"),
    "quantized": Part("the quantised model", _quantized),
    "quantized/baseline": Part("the unpruned quantised baseline", _quantized),
    "benchmark": Part("the benchmark", _benchmark),
}
"""By the name under which the report's stage is given a stage's folder. A new stage adds its own."""

_KEY = re.compile(r"\b[0-9a-f]{64}\b")
"""What a folder of the store is called."""
_ABSOLUTE = re.compile(r"(?<![\w.~/:\\-])(?:/|[A-Za-z]:\\)(?:[^\s:'\",]+[/\\])+")


def _without_folders(value: Any) -> Any:
    """A JSON value whose absolute paths keep their last part only: the rest says where, not what."""
    if isinstance(value, dict):
        return {key: _without_folders(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(entry) for entry in value]
    if not isinstance(value, str):
        return value
    for kind in (PurePosixPath, PureWindowsPath):
        if kind(value).is_absolute():
            return kind(value).name or value
    return _ABSOLUTE.sub("", value)
