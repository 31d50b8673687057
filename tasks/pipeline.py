"""The pipeline of a recipe: which steps there are, and what each reads. A plan; `tasks/walk.py` performs it."""

import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from camera.benchmark.llama_cpp import build_digest
from camera.checkpoints.checkpoint import Checkpoint
from camera.data import hub, sampled_windows
from camera.devices import describe_device, resolve_device
from camera.digests import digest_json
from camera.errors import CameraError
from camera.evaluation.lm_eval_tasks import lm_eval_version
from camera.options import DatasetOptions, QuantizeOptions
from camera.pruning.plan import plan_prune
from tasks.gate import check_tasks, check_texts
from tasks.recipe import Recipe
from tasks.sources import Sources
from tasks.stage import Input, Step
from tasks.stages import (
    benchmark,
    capture,
    convert,
    evaluate,
    evaluate_task,
    fetch,
    prune,
    publish,
    quantize,
    report,
    save,
    score,
)


@dataclass(frozen=True)
class Pipeline:
    """All steps of a recipe, in an order in which they can run."""

    recipe: Recipe
    sources: Sources
    steps: list[Step] = field(default_factory=list)

    @property
    def key(self) -> str:
        """Identity of the run: digest of what is asked for and of the sources. Same key, same result."""
        asked = [[step.name, step.stage.name, step.stage.version, step.options] for step in self.steps]
        sources = (self.sources.folder, *self.sources.files.values(), *self.sources.tasks.values())
        given = [source.digest for source in sources]
        return digest_json({"name": self.recipe.name, "steps": asked, "sources": given})

    @property
    def results(self) -> list[str]:
        """The steps whose files a run is for; of the others only what these still need is ever made."""
        names = [step.name for step in self.steps]
        return [name for name in ("report", "publish" if "publish" in names else "convert") if name in names]


def build_pipeline(recipe: Recipe, sources: Sources) -> Pipeline:
    """Lay out the steps of a recipe.

    Raises:
        CameraError: if the device is not there, or the prune section would remove nothing.
    """
    if recipe.sweep is not None:
        raise CameraError(
            "this recipe has a section `sweep`: run it with `camera sweep`, or with --set sweep=null"
        )
    checkpoint = sources.checkpoint
    model = sources.model
    steps = [
        _fetch("fetch calibration", "calibration", recipe.calibration, sources),
        *_pruned(recipe, checkpoint, model),
        Step(
            "save",
            save.STAGE,
            {"base_model": _base_model(recipe)},
            {"model": sources.folder, "pruned": "prune"},
        ),
        *_quantized("", recipe.name, recipe.quantize, "save"),
        *_quantized(
            " baseline", f"{_base_name(recipe)}-unpruned", QuantizeOptions(type=recipe.baseline), model
        ),
    ]
    evaluations = _evaluations(recipe, sources)
    steps += evaluations
    steps.append(_benchmark(recipe, model))
    parts = {
        "capture": "capture",
        "scores": "score",
        "pruned": "prune",
        "saved": "save",
        "quantized": "quantize",
        "quantized_baseline": "quantize baseline",
        "benchmark": "benchmark",
        **{step.name.replace(" ", "/"): step.name for step in evaluations if step.stage is not fetch.STAGE},
    }
    described = recipe.model_dump(mode="json", exclude={"tracking", "publish", "sweep", "benchmark_host"})
    reported: dict[str, Any] = {"name": recipe.name, "recipe": described}
    if (require := recipe.publish.require) is not None:
        check_texts(require, _labelled(recipe.evaluate.datasets))
        check_tasks(require, recipe.evaluate.tasks)
        reported["require"] = require.model_dump(mode="json", exclude_none=True)
    steps.append(Step("report", report.STAGE, reported, {"model": model, **parts}))
    if recipe.publish.enabled:
        steps.append(
            Step(
                "publish",
                publish.STAGE,
                {
                    "name": recipe.name,
                    "base_model": _base_model(recipe),
                    "recipe": described,
                    "register": recipe.tracking.enabled,
                    # The gate's verdict is in the report, which is an input.
                    **recipe.publish.model_dump(mode="json", exclude={"enabled", "require"}),
                    "folder": str(recipe.publish.folder.resolve()),  # a place is what publishing is about
                },
                {"model": "save", "converted": "convert", "report": "report", "pruned": "prune"},
            )
        )
    return Pipeline(recipe, sources, steps)


def _base_model(recipe: Recipe) -> str:
    """A hub id as it is; of a folder the name alone, for where it lies is no part of the result."""
    folder = Path(recipe.model)
    return folder.resolve().name if folder.is_dir() else recipe.model


def _base_name(recipe: Recipe) -> str:
    """The source model's own name: what is made of it alone is the same for every recipe."""
    return _base_model(recipe).rpartition("/")[2]


def _fetch(
    name: str, purpose: str, dataset: DatasetOptions, sources: Sources, window: int | None = None
) -> Step:
    options = {**dataset.model_dump(mode="json", exclude={"path"}), "purpose": purpose}
    inputs: dict[str, str | Input] = {"tokenizer": sources.tokenizer}
    if dataset.path is not None:
        inputs["file"] = sources.files[str(dataset.path)]
    elif dataset.name == "stdlib":
        options["python"] = platform.python_version()  # another interpreter is another text
    elif dataset.revision is None:
        options["revision"] = hub.DATASETS[dataset.name].revision
    if window is not None and sampled_windows(dataset) is not None:
        options["window"] = window
    return Step(name, fetch.STAGE, options, inputs)


def _pruned(recipe: Recipe, checkpoint: Checkpoint, model: Input) -> list[Step]:
    """From calibration tokens to kept channels. A capture that decides depends on what is asked of pruning; else its
    statistics serve every recipe."""
    plan = plan_prune(checkpoint, recipe.capture, recipe.prune)
    asked = recipe.prune.identity()
    decided = {
        "kept": plan.kept,
        **{name: asked[name] for name in asked.keys() - {"ratio", "multiple_of", "mode"}},
    }
    options = {
        **recipe.capture.identity(),
        "device": resolve_device(recipe.capture.device).type,
        "decide": decided if plan.decides_in_capture else None,
    }
    settings = recipe.capture.execution() | {"device": recipe.capture.device}
    inputs: dict[str, str | Input] = {"model": model, "calibration": "fetch calibration"}
    scored: dict[str, str | Input] = {"model": model, "statistics": "capture"}
    return [
        Step("capture", capture.STAGE, options, inputs, settings),
        Step("score", score.STAGE, {"reduce_ratio": recipe.prune.reduce_ratio}, scored),
        Step("prune", prune.STAGE, asked, {"model": model, "scores": "score", "captured": "capture"}),
    ]


def _quantized(suffix: str, name: str, options: QuantizeOptions, model: "str | Input") -> list[Step]:
    packed, settings = options.identity(), {}
    inputs: dict[str, str | Input] = {"model": model}
    if options.calibrates:
        packed["device"] = resolve_device(options.device).type
        settings = options.model_dump(mode="json", include={"batch_size", "device"})
        inputs["calibration"] = "fetch calibration"
    return [
        Step(f"quantize{suffix}", quantize.STAGE, packed, inputs, settings),
        Step(
            f"convert{suffix}",
            convert.STAGE,
            {"name": f"{name}-{options.type}", "twin": options.twin},
            {"quantized": f"quantize{suffix}"},
        ),
    ]


_TASKS = {"tasks", "few_shot", "limit", "task_folder"}
"""Fields of `evaluate` that are not about texts."""


def _evaluations(recipe: Recipe, sources: Sources) -> list[Step]:
    asked = recipe.evaluate
    settings = asked.model_dump(mode="json", include={"batch_size", "device"})
    device = resolve_device(asked.device).type
    models: dict[str, str | Input] = {
        "original": sources.model,
        "baseline": "quantize baseline",
        "pruned": "save",
        "pruned+quantized": "quantize",
    }
    steps = []
    on_text = asked.model_dump(mode="json", exclude={"datasets", "batch_size"} | _TASKS) | {"device": device}
    for label, dataset in _labelled(asked.datasets).items():
        steps.append(_fetch(f"fetch {label}", "evaluation", dataset, sources, asked.window))
        steps += [
            Step(
                f"evaluate {name} {label}",
                evaluate.STAGE,
                {**on_text, "dataset": label},
                {"model": model, "text": f"fetch {label}"},
                settings,
            )
            for name, model in models.items()
        ]
    for task in asked.tasks:
        on_task = {
            "task": task,
            "few_shot": asked.few_shot,
            "limit": asked.limit,
            "dtype": asked.dtype,
            "device": device,
            "lm_eval": lm_eval_version(),  # prompts are its own
        }
        documents = {"documents": sources.tasks[task]} if asked.task_folder is not None else {}
        steps += [
            Step(f"task {name} {task}", evaluate_task.STAGE, on_task, {"model": model, **documents}, settings)
            for name, model in models.items()
        ]
    return steps


def _labelled(datasets: tuple[DatasetOptions, ...]) -> dict[str, DatasetOptions]:
    labelled: dict[str, DatasetOptions] = {}
    for dataset in datasets:
        label = dataset_label(dataset)
        if label == "calibration":  # `fetch calibration` is another step
            raise CameraError(f"evaluate.datasets: {dataset.path} cannot be called {label}: rename the file")
        if label in labelled:
            raise CameraError(f"evaluate.datasets: two of them are called {label}: rename one of the files")
        labelled[label] = dataset
    return labelled


def dataset_label(dataset: DatasetOptions) -> str:
    """A short name for a text: `stdlib-test`, or the file's name."""
    if dataset.path is not None:
        return Path(dataset.path).stem.replace(" ", "_")
    return f"{dataset.name}-{dataset.split}"


def _benchmark(recipe: Recipe, model: Input) -> Step:
    asked = recipe.benchmark
    settings = asked.model_dump(mode="json", include={"device", "timeout"})
    options = asked.model_dump(mode="json", exclude={"timeout"})
    # A time measured on another card is another result.
    if (host := recipe.benchmark_host) is None:
        device = resolve_device(asked.device)
        options |= {"device": device.type, "device_name": describe_device(device)["name"]}
        if "llama.cpp" in asked.engines:  # nor one of another build
            options["llama_cpp_build"] = build_digest(asked.llama_cpp)
    else:  # the same key as there, so that what was measured there before is found
        options |= {"device": asked.device.partition(":")[0], "device_name": host.device_name}
    inputs: dict[str, str | Input] = {
        "original": model,
        "baseline": "convert baseline",
        "pruned": "save",
        "pruned+quantized": "convert",
    }
    return Step("benchmark", benchmark.STAGE, options, inputs, settings)
