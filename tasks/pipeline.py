"""The pipeline of a recipe: which steps there are, and what each reads. A plan; `tasks/plan.py` performs it."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from camera.checkpoints.checkpoint import Checkpoint
from camera.data import sampled_windows
from camera.devices import (
    describe_device,
    devices_of,
    driver_versions,
    find_device,
    refuse_false_times,
    resolve_device,
)
from camera.digests import digest_json
from camera.errors import CameraError
from camera.evaluation.lm_eval_tasks import lm_eval_version
from camera.options import CalibrationOptions, DatasetOptions, PerplexityOptions, QuantizeOptions
from camera.pruning.plan import plan_prune
from camera.registry import DATA_SETS, ENGINES
from tasks.gate import check_requirements
from tasks.options import Sections
from tasks.recipe import Recipe
from tasks.sources import Sources
from tasks.stage import STAGES, Input, Step
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
    sample,
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
        asked = [
            [step.name, step.stage.name, step.stage.version, step.options.identity(), step.facts]
            for step in self.steps
        ]
        sources = (self.sources.folder, *self.sources.files.values(), *self.sources.tasks.values())
        given = [source.digest for source in sources]
        return digest_json({"name": self.recipe.name, "steps": asked, "sources": given})

    @property
    def results(self) -> list[str]:
        """The steps whose files a run is for; of the others only what these still need is ever made."""
        names = [step.name for step in self.steps]
        return [name for name in ("report", "publish" if "publish" in names else "convert") if name in names]

    def up_to(self, *names: str) -> "Pipeline":
        """The same with these steps and what they need alone."""
        needed = set(names)
        for step in reversed(self.steps):
            if step.name in needed:
                needed.update(step.needs)
        return replace(self, steps=[step for step in self.steps if step.name in needed])


def build_pipeline(recipe: Recipe, sources: Sources) -> Pipeline:
    """Lay out the steps of a recipe.

    Raises:
        CameraError: if the device is not there, or the prune section would remove nothing.
    """
    if recipe.sweep is not None:
        raise CameraError(
            "this recipe has a section `sweep`: run it with `camera sweep`, or with --set sweep=null"
        )
    checkpoint, model = sources.checkpoint, sources.model
    base_model = _base_model(recipe)
    unpruned = f"{base_model.rpartition('/')[2]}-unpruned"  # the same for every recipe of this model
    packing_baseline = QuantizeOptions(type=recipe.baseline, device=recipe.quantize.device)
    card = save.SaveOptions(base_model=base_model)
    steps = [
        _fetch("fetch calibration", "calibration", recipe.calibration, sources),
        *_pruned(recipe, checkpoint, model),
        Step("save", save.STAGE, Sections(card=card), {"model": sources.folder, "pruned": "prune"}),
        *_quantized("", recipe.name, recipe.quantize, "save"),
        *_quantized(" baseline", unpruned, packing_baseline, model),
        *_evaluations(recipe, sources),
        _benchmark(recipe, model),
    ]
    for stage in STAGES.values():
        steps += stage.joins(steps)
    parts = {step.part: step.name for step in steps if step.part is not None}
    require = recipe.publish.require
    if require is not None:
        check_requirements(require, _labelled(recipe.evaluate.datasets), recipe.evaluate.tasks)
    described = recipe.identity()
    about = report.ReportOptions(name=recipe.name, recipe=described, require=require)
    steps.append(Step("report", report.STAGE, Sections(report=about), {"model": model, **parts}))
    if recipe.publish.enabled:
        folder = recipe.publish.folder.resolve()  # a place is what publishing is about
        publication = publish.PublicationOptions(
            name=recipe.name,
            base_model=base_model,
            recipe=described,
            register_model=recipe.tracking.enabled,
        )
        asked = Sections(
            publish=recipe.publish.model_copy(update={"folder": folder}), publication=publication
        )
        inputs = {"model": "save", "converted": "convert", "report": "report", "pruned": "prune"}
        steps.append(Step("publish", publish.STAGE, asked, inputs))
    return Pipeline(recipe, sources, steps)


def _base_model(recipe: Recipe) -> str:
    """A hub id as it is; of a folder the name alone, for where it lies is no part of the result."""
    folder = Path(recipe.model)
    return folder.resolve().name if folder.is_dir() else recipe.model


def _fetch(
    name: str, purpose: str, dataset: CalibrationOptions | fetch.TextOptions, sources: Sources
) -> Step:
    inputs: dict[str, str | Input] = {"tokenizer": sources.tokenizer}
    if dataset.path is not None:
        inputs["file"] = sources.files[str(dataset.path)]
    facts = DATA_SETS[dataset.name].identity(dataset)
    resolved = {name: facts.pop(name) for name in facts.keys() & type(dataset).model_fields.keys()}
    return Step(name, fetch.STAGE, Sections({purpose: dataset.model_copy(update=resolved)}), inputs, facts)


def _pruned(recipe: Recipe, checkpoint: Checkpoint, model: Input) -> list[Step]:
    """From calibration tokens to kept channels. A capture that decides depends on what is asked of pruning; else its
    statistics serve every recipe."""
    plan = plan_prune(checkpoint, recipe.capture, recipe.prune)
    asked = Sections(capture=recipe.capture)
    if plan.decides_in_capture:
        others = tuple(cut.kept for cut in plan.cuts[1:])
        asked["decide"] = capture.DecideOptions(**vars(recipe.prune), kept=plan.kept, others_kept=others)
    scoring = score.ScoreOptions(reduce_ratio=recipe.prune.reduce_ratio)
    facts = {"device": devices_of(recipe.capture.device, recipe.capture.devices)[0].type}
    inputs: dict[str, str | Input] = {"model": model, "calibration": "fetch calibration"}
    return [
        Step("capture", capture.STAGE, asked, inputs, facts),
        Step("score", score.STAGE, Sections(score=scoring), {"model": model, "statistics": "capture"}),
        Step(
            "prune",
            prune.STAGE,
            Sections(prune=recipe.prune),
            {"model": model, "scores": "score", "captured": "capture"},
        ),
    ]


def _quantized(suffix: str, name: str, options: QuantizeOptions, model: "str | Input") -> list[Step]:
    inputs: dict[str, str | Input] = {"model": model}
    facts = {}
    if options.calibrates:
        facts["device"] = find_device(options.device).type
        inputs["calibration"] = "fetch calibration"
    converting = convert.ConvertOptions(name=f"{name}-{options.type}", twin=options.twin)
    packed = f"quantize{suffix}"
    return [
        Step(packed, quantize.STAGE, Sections(quantize=options), inputs, facts),
        Step(f"convert{suffix}", convert.STAGE, Sections(convert=converting), {"quantized": packed}),
    ]


def _evaluations(recipe: Recipe, sources: Sources) -> list[Step]:
    asked = recipe.evaluate
    facts = {"device": find_device(asked.device).type}
    models: dict[str, str | Input] = {
        "original": sources.model,
        "baseline": "quantize baseline",
        "pruned": "save",
        "pruned+quantized": "quantize",
    }
    steps = []
    for label, dataset in _labelled(asked.datasets).items():
        window = asked.window if sampled_windows(dataset) is not None else None
        text = fetch.TextOptions(**vars(dataset), window=window)
        on_text = evaluate.EvaluateTextOptions(**asked.fields_of(PerplexityOptions), dataset=label)
        steps.append(_fetch(f"fetch {label}", "evaluation", text, sources))
        for name, model in models.items():
            read = {"model": model, "text": f"fetch {label}"}
            asking = Sections(evaluate=on_text)
            steps.append(Step(f"evaluate {name} {label}", evaluate.STAGE, asking, read, facts))
    for task in asked.tasks:
        on_task = evaluate_task.EvaluateTaskOptions(**asked.on_tasks, task=task)
        documents = {"documents": sources.tasks[task]} if asked.task_folder is not None else {}
        also = facts | {"lm_eval": lm_eval_version()}  # prompts are its own
        for name, model in models.items():
            read = {"model": model, **documents}
            steps.append(Step(f"task {name} {task}", evaluate_task.STAGE, Sections(task=on_task), read, also))
    if asked.samples:
        writing = sample.SampleOptions(tokens=asked.samples, dtype=asked.dtype, device=asked.device)
        for name, model in models.items():
            steps.append(
                Step(f"sample {name}", sample.STAGE, Sections(sample=writing), {"model": model}, facts)
            )
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
    # A time measured on another card is another result, and so is one with other versions or settings.
    if (host := recipe.benchmark_host) is None:
        device = resolve_device(asked.device)
        refuse_false_times(device)
        facts: dict[str, Any] = {
            "device": device.type,
            "device_name": describe_device(device)["name"],
            "builds": {name: ENGINES[name].identity(asked) for name in asked.engines},
            "drivers": driver_versions(device),
        }
    else:  # the same key as there, so that what was measured there before is found
        facts = {"device": asked.device.partition(":")[0], "device_name": host.device_name}
    inputs: dict[str, str | Input] = {
        "original": model,
        "baseline": "convert baseline",
        "pruned": "save",
        "pruned+quantized": "convert",
    }
    return Step("benchmark", benchmark.STAGE, Sections(benchmark=asked), inputs, facts)
