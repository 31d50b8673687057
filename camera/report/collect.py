"""What a run found, gathered from the folders of its stages: the one source of report, table, CSV and model card.

It holds no time, no path of the machine and no run id, so that the same artifacts give the same bytes.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from pydantic import ValidationError

from camera.benchmark.report import BenchmarkReport, BenchmarkRow
from camera.checkpoints.checkpoint import Checkpoint
from camera.devices import dtype_name
from camera.errors import CameraError
from camera.evaluation.tasks import TaskResult
from camera.files import read_json
from camera.formats.quantized_model import SUMMARY_NAME, QuantizeReport, TensorRecord, parse_report
from camera.pruning.decision import Pruned, read_scores
from camera.report.damage import layer_damage
from camera.report.importance import summarize_layer
from camera.report.measurements import perplexities, score_text, task_results
from camera.report.schema import (
    MODEL_IDS,
    Device,
    FallBack,
    LayerImportance,
    ModelId,
    ModelRow,
    PruneSummary,
    Quantization,
    Results,
    TypeTotal,
)
from camera.report.task_scores import score_task, with_averages

_SHORT_DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_PARTS = {
    "capture": "the calibration statistics",
    "scores": "the importance scores",
    "pruned": "the prune summary",
    "saved": "the pruned checkpoint",
    "quantized": "the quantised model",
    "quantized/baseline": "the unpruned quantised baseline",
    "benchmark": "the benchmark",
}
_QUANTIZED: dict[ModelId, str] = {"baseline": "quantized/baseline", "pruned+quantized": "quantized"}


def collect_results(
    *, name: str, recipe: dict[str, Any], folders: Mapping[str, Path], source_config: dict[str, Any]
) -> Results:
    """Gather the results of a run.

    Args:
        name: of the published model.
        recipe: what was run, as plain JSON.
        folders: what the stages wrote: `capture`, `scores`, `pruned`, `saved`, `quantized`, `quantized/baseline`,
            `benchmark`, and `evaluate/<model>/<text>` and `task/<model>/<task>` with a model of `MODEL_IDS`. A part that is not there is
            missing from the results, and they say so.
        source_config: config.json of the source model.

    Raises:
        CameraError: if a folder that is given does not hold what its stage writes.
    """
    titles = model_titles(recipe)
    report = _benchmark(folders.get("benchmark"))
    evaluated, tasks = perplexities(folders), task_results(folders)
    missing = [f"{words} ({part})" for part, words in _PARTS.items() if part not in folders]
    if not evaluated:
        missing.append("perplexity (evaluate)")
    return Results(
        name=name,
        base_model=_without_folders(str(recipe.get("model", "the source model"))),
        model_type=str(source_config.get("model_type", "")),
        layers=int(source_config["num_hidden_layers"]),
        hidden_size=int(source_config["hidden_size"]),
        recipe=_without_folders(recipe),
        models=tuple(with_averages(_model_rows(titles, folders, source_config, evaluated, tasks))),
        prune=_prune_summary(folders),
        importance=tuple(_importance(folders, int(source_config["num_hidden_layers"]))),
        damage=layer_damage(folders.get("pruned")),
        quantization=tuple(
            _quantization(model, parse_report(folders[part] / SUMMARY_NAME))
            for model, part in _QUANTIZED.items()
            if part in folders
        ),
        benchmark=() if report is None else tuple(_speed(row, titles) for row in report.rows),
        benchmark_baseline=None
        if report is None or report.baseline is None
        else _title(report.baseline, titles),
        device=None if report is None else _device(report),
        missing=tuple(missing),
    )


def model_titles(recipe: Mapping[str, Any]) -> dict[ModelId, str]:
    """What tables call the four models of a recipe."""
    return {
        "original": "original",
        "baseline": f"unpruned, {recipe.get('baseline', 'q4_0')}",
        "pruned": "pruned",
        "pruned+quantized": f"pruned, {recipe.get('quantize', {}).get('type', 'quantised')}",
    }


def _model_rows(
    titles: Mapping[ModelId, str],
    folders: Mapping[str, Path],
    source_config: dict[str, Any],
    evaluated: Mapping[ModelId, Mapping[str, dict[str, Any]]],
    tasks: Mapping[ModelId, Mapping[str, TaskResult]],
) -> list[ModelRow]:
    """A row for every model of which anything is known."""
    facts: dict[ModelId, dict[str, Any]] = {}
    if "saved" in folders:
        saved = Checkpoint.open(folders["saved"])
        facts["original"] = _checkpoint_facts(saved, int(source_config["intermediate_size"]))
        facts["pruned"] = _checkpoint_facts(saved, saved.ffn_width)
    for model, part in _QUANTIZED.items():
        if part in folders:
            facts[model] = _quantized_facts(folders[part])
    rows = []
    for model in MODEL_IDS:
        measured, answered = evaluated.get(model, {}), tasks.get(model, {})
        if model in facts or measured or answered:
            originals = evaluated.get("original", {})
            references = {} if model == "original" else tasks.get("original", {})
            rows.append(
                ModelRow(
                    id=model,
                    title=titles[model],
                    perplexity={
                        text: score_text(found, originals.get(text)) for text, found in measured.items()
                    },
                    tasks={task: score_task(found, references.get(task)) for task, found in answered.items()},
                    **facts.get(model, {}),
                )
            )
    return rows


def _checkpoint_facts(checkpoint: Checkpoint, ffn_width: int) -> dict[str, Any]:
    """Sizes of a checkpoint if its FFN had so many channels: those of the original follow from the pruned one."""
    ffn = {name for layer in range(checkpoint.layer_count) for name in checkpoint.family.ffn_names(layer)}
    parameters = size = 0
    for name, info in checkpoint.needed.items():
        count = prod(info.shape)
        if name in ffn:
            count = count // checkpoint.ffn_width * ffn_width
        parameters += count
        size += count * info.dtype.itemsize
    dtype = dtype_name(checkpoint.dtype)
    return {
        "type": _SHORT_DTYPES.get(dtype, dtype),
        "ffn_width": ffn_width,
        "parameters": parameters,
        "bytes": size,
        "bits_per_weight": 8 * size / parameters,
    }


def _quantized_facts(folder: Path) -> dict[str, Any]:
    report = parse_report(folder / SUMMARY_NAME)
    return {
        "type": report.type,
        "ffn_width": int(read_json(folder / "config.json")["intermediate_size"]),
        "parameters": report.parameters,
        "bytes": report.bytes,
        "bits_per_weight": report.bits_per_weight,
    }


def _prune_summary(folders: Mapping[str, Path]) -> PruneSummary | None:
    if "pruned" not in folders:
        return None
    summary = read_json(folders["pruned"] / "prune.json")
    captured = read_json(folders["capture"] / "capture.json") if "capture" in folders else {}
    scored = read_json(folders["scores"] / "scores.json") if "scores" in folders else {}
    wanted = ("ratio", "mode", "multiple_of", "width", "kept_width", "removed_share")
    return PruneSummary(
        **{key: summary[key] for key in wanted},
        reduce_ratio=scored.get("reduce_ratio"),
        propagate=captured.get("propagate"),
        calibration_samples=captured.get("samples"),
        calibration_tokens=captured.get("tokens"),
    )


def _importance(folders: Mapping[str, Path], count: int) -> list[LayerImportance]:
    if "scores" not in folders:
        return []
    scores = read_scores(folders["scores"], count)
    if "pruned" not in folders:
        return [summarize_layer(layer, scores_F) for layer, scores_F in enumerate(scores)]
    kept = Pruned.open(folders["pruned"]).kept()
    shares = read_json(folders["pruned"] / "prune.json")["importance_kept_share"]
    return [
        summarize_layer(layer, *of_layer)
        for layer, of_layer in enumerate(zip(scores, kept, shares, strict=True))
    ]


def _quantization(model: ModelId, report: QuantizeReport) -> Quantization:
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
            FallBack(tensor=record.name, stored=record.type, reason=str(record.fallback))
            for record in report.fallbacks
        ),
    )


def _benchmark(folder: Path | None) -> BenchmarkReport | None:
    if folder is None:
        return None
    path = folder / "benchmark.json"
    try:
        return BenchmarkReport.model_validate(read_json(path))
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise CameraError(f"{path} is no benchmark of this version ({where}): run it again") from None


def _speed(row: BenchmarkRow, titles: Mapping[ModelId, str]) -> BenchmarkRow:
    failure = None if row.failure is None else _without_folders(row.failure)
    return row.model_copy(update={"model": _title(row.model, titles), "failure": failure})


def _title(label: str, titles: Mapping[ModelId, str]) -> str:
    """The title of a benchmark's model: the stage labels models by id; any other label is a title already."""
    return next((title for model, title in titles.items() if model == label), label)


def _device(report: BenchmarkReport) -> Device:
    return Device(
        name=str(report.device.get("name", "unknown")),
        kind=str(report.device.get("kind", "unknown")),
        threads=report.options["threads"] or report.device.get("threads"),
        versions=report.versions,
        bandwidth_bytes_per_second=report.bandwidth_bytes_per_second,
    )


_ABSOLUTE = re.compile(r"(?<![\w.~/:\\-])(?:/|[A-Za-z]:\\)(?:[^\s:'\",]+[/\\])+")


def _without_folders(value: Any) -> Any:
    """A JSON value whose absolute paths keep their last part only: the rest says where, not what."""
    if isinstance(value, dict):
        return {key: _without_folders(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(entry) for entry in value]
    if not isinstance(value, str):
        return value
    if PurePosixPath(value).is_absolute():
        return PurePosixPath(value).name or value
    if PureWindowsPath(value).is_absolute():
        return PureWindowsPath(value).name or value
    return _ABSOLUTE.sub("", value)
