"""Before a run: what would run, how much memory and disk it needs, and whether there is room."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from camera.benchmark.bandwidth import BUFFER_BYTES
from camera.checkpoints.checkpoint import Checkpoint
from camera.devices import resolve_dtype
from camera.errors import CameraError
from camera.pruning.estimate import CaptureEstimate, estimate_capture
from camera.pruning.plan import plan_prune
from camera.registry import BLOCK_FORMATS
from camera.units import bytes_text
from tasks.pipeline import Pipeline
from tasks.stage import Request, RunReferences, Step, find
from tasks.stages import capture, publish
from tasks.store import Artifact, Store

_PROCESS_BYTES = 680 << 20
"""Resident in the process of a run before any weight: 400 MiB are Python, torch for the CPU and transformers with the
modules of a model's layers; MLflow adds 180, Prefect 90, and what the stages import the rest."""
_STAGE_BYTES = {"task": 40 << 20}
"""Libraries that one stage alone brings: lm-eval."""
_MOMENT_SQUARES = 5
"""Of float64, alive at most while GPTQ inverts the moments of one input."""
_ACTIVATION_BYTES = 1 << 30  # what sequential capture keeps at most


@dataclass(frozen=True)
class StepPlan:
    """What is known of a step before the run."""

    step: Step
    state: str
    """`cached`, `evicted` (and no step needs its files), `run`, or `after` (runs unless what it waits for comes out
    as an artifact that the store has)."""
    disk_bytes: int
    memory_bytes: int
    seconds: float | None = None
    """Only for the step that walks through the model, if it is to run; from a trial of one batch in one layer."""


def plan(pipeline: Pipeline, store: Store) -> list[StepPlan]:
    """Which steps would run. Verifies what is in the store, and runs nothing but a trial of the first layer."""
    states, _ = _states(pipeline, lambda request: find(store, request), store)
    plans = []
    for step in pipeline.steps:
        state = states[step.name]
        disk, memory = _needs(pipeline, step)
        seconds = None
        if step.stage is capture.STAGE and state in ("run", "after"):
            estimate = _estimate(pipeline)
            memory, seconds = estimate.peak_bytes, estimate.seconds
        plans.append(StepPlan(step, state, disk, memory, seconds))
    return plans


def _states(
    pipeline: Pipeline, look: Callable[[Request], Artifact | None], store: Store
) -> tuple[dict[str, str], dict[str, str]]:
    """What would become of every step, and the keys as far as they are known; as in `tasks.walk`."""
    done: dict[str, Artifact] = {}
    states: dict[str, str] = {}
    keys: dict[str, str] = {}

    def runs(step: Step, state: str) -> None:
        states[step.name] = state
        for earlier in pipeline.steps:
            if earlier.name in step.needs and states[earlier.name] == "evicted":
                runs(earlier, state)

    for step in pipeline.steps:
        if not all(name in done for name in step.needs):
            runs(step, "after")
            continue
        request = step.request(done, RunReferences())
        keys[step.name] = request.key
        if (artifact := look(request)) is not None:
            states[step.name], done[step.name] = "cached", artifact
        elif step.name not in pipeline.results and (gone := store.evicted(step.stage.name, request.key)):
            states[step.name], done[step.name] = "evicted", gone
        else:
            runs(step, "run")
    return states, keys


def _estimate(pipeline: Pipeline) -> CaptureEstimate:
    checkpoint, recipe = pipeline.sources.checkpoint, pipeline.recipe
    tokens = recipe.calibration
    pruning = plan_prune(checkpoint, recipe.capture, recipe.prune)
    estimate = estimate_capture(checkpoint, tokens.samples, tokens.length, recipe.capture, pruning)
    if not estimate.process_bytes:
        return estimate
    # Tried in this process, and run in one that holds more.
    return replace(estimate, peak_bytes=estimate.peak_bytes + _PROCESS_BYTES - estimate.process_bytes)


def check_room(pipeline: Pipeline, store: Store) -> None:
    """Refuse a run that cannot end well: no disk space for the steps that are not in the store, or a taken folder.

    Raises:
        CameraError: saying how much is needed and where.
    """
    recipe = pipeline.recipe
    if recipe.publish.enabled:
        publish.refuse_foreign(publish.destination(recipe.publish.folder, recipe.name), recipe.name)
    store.root.mkdir(parents=True, exist_ok=True)
    needed = room_needed(pipeline, store)
    free = shutil.disk_usage(store.root).free
    if needed > free:
        raise CameraError(
            f"{store.root} has {bytes_text(free)} free and this recipe needs about {bytes_text(needed)}: "
            "free some space, or put the store elsewhere with CAMERA_HOME"
        )


def room_needed(pipeline: Pipeline, store: Store) -> int:
    """About how many bytes the steps that are not in the store will still write there."""
    return sum(_disk_to_come(pipeline, store))


def _disk_to_come(pipeline: Pipeline, store: Store) -> Iterator[int]:
    """Bytes that each step will still write to the store. Believes the manifests: the run itself verifies."""
    states, keys = _states(pipeline, lambda request: store.peek(request.stage.name, request.key), store)
    for step in pipeline.steps:
        if states[step.name] in ("cached", "evicted"):
            continue
        disk = 0 if step.stage.name == "publish" else _needs(pipeline, step)[0]
        if step.name in keys:
            disk -= _size(store.working(step.stage.name, keys[step.name]))
        yield max(disk, 0)


def _size(folder: Path) -> int:
    size = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # another run may be at work in it
            size += path.stat().st_size
    return size


def _needs(pipeline: Pipeline, step: Step) -> tuple[int, int]:
    """Estimated disk and peak memory of a step, in bytes, from the config and the sizes of the tensors alone."""
    checkpoint, recipe = pipeline.sources.checkpoint, pipeline.recipe
    width = checkpoint.ffn_width
    pruning = plan_prune(checkpoint, recipe.capture, recipe.prune)
    kept = pruning.kept
    ffn_names = {name for layer in range(checkpoint.layer_count) for name in checkpoint.ffn_names(layer)}
    sizes = {name: info.size_bytes for name, info in checkpoint.needed.items()}
    whole = sum(sizes.values())
    ffn = sum(size for name, size in sizes.items() if name in ffn_names)
    share = kept / width
    pruned = whole - round(ffn * (1 - share))
    elements = whole // checkpoint.dtype.itemsize
    pruned_elements = pruned // checkpoint.dtype.itemsize
    largest = max(sizes.values())
    layer = sum(sizes[name] for name in checkpoint.layer_tensors(0))
    calibration = recipe.calibration.samples * recipe.calibration.length
    compute = resolve_dtype(recipe.capture.dtype, checkpoint.dtype)
    hidden = calibration * checkpoint.hidden_size * compute.itemsize
    widened = compute.itemsize / checkpoint.dtype.itemsize
    activations = min(_ACTIVATION_BYTES, calibration * width * compute.itemsize)
    stage = step.stage.name
    state = hidden + 12 * width * checkpoint.layer_count
    refitted = round(ffn * share / 3) if pruning.needs_gram else 0
    matrices = round(ffn * share) if pruning.sparsity else refitted
    disk = {
        "fetch": 8 * calibration,
        "capture": state + matrices,
        "prune": matrices,
        "save": pruned,
        "quantize": _quantized(step, elements if step.name.endswith("baseline") else pruned_elements),
        "convert": _packed(
            recipe.baseline if step.name.endswith("baseline") else recipe.quantize.type,
            elements if step.name.endswith("baseline") else pruned_elements,
        ),
        "publish": pruned + _packed(recipe.quantize.type, pruned_elements),
    }
    evaluate = resolve_dtype(recipe.evaluate.dtype, checkpoint.dtype)
    memory = {
        "capture": round(2 * layer * (1 + widened)) + hidden + activations,
        "score": 3 * largest,
        "save": 2 * largest,
        "quantize": 4 * largest + _calibrating(step, checkpoint, calibration, kept),
        "convert": 2 * largest,
        "evaluate": elements * evaluate.itemsize + 2 * largest,
        "task": elements * evaluate.itemsize + 2 * largest,
        "benchmark": max(BUFFER_BYTES, 2 * whole + elements * torch.float32.itemsize),
    }
    return disk.get(stage, 0), _PROCESS_BYTES + _STAGE_BYTES.get(stage, 0) + memory.get(stage, 0)


def _packed(type_name: str, elements: int) -> int:
    return round(elements * BLOCK_FORMATS[type_name].bits_per_weight / 8)


def _quantized(step: Step, elements: int) -> int:
    bits = step.options.get("target_bpw") or BLOCK_FORMATS[step.options.get("type", "f16")].bits_per_weight
    return round(elements * bits / 8)


def _calibrating(step: Step, checkpoint: Checkpoint, tokens: int, kept: int) -> int:
    """What a quantisation that calibrates needs beside the tensors: hidden states, a decoder layer, and for `gptq` the
    float64 squares of the widest input's moments while they are inverted."""
    method = step.options.get("method", "rtn")
    if step.stage.name != "quantize" or (method == "rtn" and "target_bpw" not in step.options):
        return 0
    compute = resolve_dtype(step.options["dtype"], checkpoint.dtype)
    elements = sum(
        checkpoint.needed[name].size_bytes // checkpoint.dtype.itemsize
        for name in checkpoint.layer_tensors(0)
    )
    walk = (tokens * checkpoint.hidden_size + elements) * compute.itemsize
    squares = _MOMENT_SQUARES * 8 * max(kept, checkpoint.hidden_size) ** 2
    return walk + (squares if method == "gptq" else 0)
