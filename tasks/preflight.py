"""Before a run: what would run, how much memory and disk it needs, and whether there is room."""

import shutil
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from camera.errors import CameraError
from camera.units import bytes_text
from tasks.estimate import PROCESS_BYTES, Known, Needs
from tasks.pipeline import Pipeline
from tasks.plan import Resolved, State, resolve
from tasks.publication import destination, refuse_foreign
from tasks.stage import Step, find
from tasks.stages import convert, fetch, publish
from tasks.store import Store


@dataclass(frozen=True)
class StepPlan:
    """What is known of a step before the run."""

    step: Step
    state: State
    disk_bytes: int
    memory_bytes: int
    seconds: float | None = None
    """Only for the step that runs the calibration tokens, if it is to run; from a trial of one batch in one layer."""


def plan(pipeline: Pipeline, store: Store) -> list[StepPlan]:
    """Which steps would run. Verifies what is in the store, and runs nothing but a trial of the first layer."""
    resolved = resolve(pipeline, lambda request: find(store, request), store)
    return [
        StepPlan(
            resolved[name].step, resolved[name].state, needs.disk, PROCESS_BYTES + needs.memory, needs.seconds
        )
        for name, needs in _needs(pipeline, resolved).items()
    ]


def _needs(pipeline: Pipeline, resolved: dict[str, Resolved] | None = None) -> dict[str, Needs]:
    """Estimates by step; with what is known of the steps, those that would run are tried where they can be."""
    found: dict[str, Needs] = {}
    whole = Known(pipeline.recipe, pipeline.sources.checkpoint).whole
    for step in pipeline.steps:
        sizes = {
            name: found[given].disk if isinstance(given, str) else whole
            for name, given in step.inputs.items()
        }
        known = Known(pipeline.recipe, pipeline.sources.checkpoint, step.options, sizes)
        runs = resolved is not None and resolved[step.name].state in ("run", "after")
        estimate = step.stage.trial if runs and step.stage.trial is not None else step.stage.needs
        found[step.name] = estimate(known)
    return found


def check_end(pipeline: Pipeline, to_run: Collection[str], store: Store | None = None) -> list[str]:
    """Ask before the first step what the last ones would only refuse after hours.

    Args:
        pipeline: its steps.
        to_run: names of those that are not in the store.
        store: the project's, which knows what was published.

    Returns:
        what should be known of the GGUF files, a sentence each.

    Raises:
        CameraError: if there is no GGUF file of the model, or it could not be published where the recipe says.
    """
    stages = [step.stage for step in pipeline.steps if step.name in to_run]
    if publish.STAGE in stages:
        publish.check_place(pipeline.recipe.publish, pipeline.recipe.name, store)
    if fetch.STAGE in stages:
        _ = pipeline.sources.tokens  # what cannot be loaded is refused
    return pipeline.sources.gguf_concerns if convert.STAGE in stages else []


def check_room(pipeline: Pipeline, store: Store) -> None:
    """Refuse a run that cannot end well: no disk space for the steps that are not in the store, or what `check_end` refuses.

    Raises:
        CameraError: saying what is in the way, and what to do.
    """
    recipe = pipeline.recipe
    if recipe.publish.enabled:
        refuse_foreign(destination(recipe.publish.folder, recipe.name), recipe.name, store)
    store.root.mkdir(parents=True, exist_ok=True)
    check_end(pipeline, _to_run(_believed(pipeline, store)), store)
    needed = room_needed(pipeline, store)
    free = shutil.disk_usage(store.root).free
    if needed > free:
        raise CameraError(
            f"{store.root} has {bytes_text(free)} free and this recipe needs about {bytes_text(needed)}: "
            "free some space, or put the store elsewhere with CAMERA_HOME"
        )


def room_needed(pipeline: Pipeline, store: Store) -> int:
    """About how many bytes the steps that are not in the store will still write there.

    Believes the manifests of the store: the run itself verifies.
    """
    resolved = _believed(pipeline, store)
    room = 0
    for name, needs in _needs(pipeline).items():
        step, request = resolved[name].step, resolved[name].request
        if resolved[name].state in ("cached", "evicted") or not needs.in_store:
            continue
        begun = 0 if request is None else _size(store.working(step.stage.name, request.key))
        room += max(needs.disk - begun, 0)
    return room


def _believed(pipeline: Pipeline, store: Store) -> dict[str, Resolved]:
    return resolve(pipeline, lambda request: store.peek(request.stage.name, request.key), store)


def _to_run(resolved: dict[str, Resolved]) -> list[str]:
    return [name for name, each in resolved.items() if each.state in ("run", "after")]


def _size(folder: Path) -> int:
    size = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # another run may be at work in it
            size += path.stat().st_size
    return size
