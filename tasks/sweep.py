"""A sweep: one recipe, every combination of the values it gives, and what the combinations share. A plan."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from camera.digests import digest_json
from camera.errors import CameraError
from tasks.options import SweepOptions
from tasks.pipeline import Pipeline, build_pipeline
from tasks.plan import resolve
from tasks.preflight import check_end
from tasks.recipe import Recipe, check_recipe, load_recipe, put, wrong_fields
from tasks.sources import Sources, find_sources
from tasks.stage import Request
from tasks.stages import publish
from tasks.store import Artifact, Store

_PLAIN = ("quantize.type", "quantize.method", "capture.propagate", "prune.mode", "prune.method")
"""Fields whose values say by themselves what they are."""
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._]+")


@dataclass(frozen=True)
class Member:
    """One combination: a whole recipe of its own."""

    name: str
    """Of the sweep, and what varies: `tiny-p20-q4_0`."""
    label: str
    """What varies alone: `p20 q4_0`."""
    varied: dict[str, Any]
    """Values by the field that varies."""
    recipe: Recipe

    def to_run(self, parent: str | None = None, publish: bool = False) -> Recipe:
        """The recipe as it is run in a sweep.

        Args:
            parent: the MLflow run of the sweep.
            publish: whether the member is published although the sweep says nothing of it.
        """
        tracking = self.recipe.tracking.model_copy(update={"parent": parent})
        publishing = self.recipe.publish.model_copy(
            update={"enabled": publish or self.recipe.publish.enabled}
        )
        return self.recipe.model_copy(update={"tracking": tracking, "publish": publishing})


@dataclass(frozen=True)
class Sweep:
    """A recipe with a section `sweep`, and its members in the order of its lists."""

    recipe: Recipe
    members: tuple[Member, ...]

    @property
    def options(self) -> SweepOptions:
        """The section `sweep`."""
        assert self.recipe.sweep is not None
        return self.recipe.sweep

    @property
    def axes(self) -> tuple[str, ...]:
        """The fields that vary."""
        return tuple(self.options.axes)


def load_sweep(path: Path, overrides: tuple[str, ...] | list[str] = ()) -> Sweep:
    """Read a recipe with a section `sweep`, and check it and every member.

    Raises:
        CameraError: naming the field that is wrong, down to the value in its list.
    """
    return sweep_of(load_recipe(path, overrides), str(path))


def sweep_of(recipe: Recipe, where: str) -> Sweep:
    """Check a recipe with a section `sweep` and every member.

    Args:
        recipe: the recipe.
        where: what messages call it.

    Raises:
        CameraError: naming the field that is wrong, down to the value in its list.
    """
    if recipe.sweep is None:
        raise CameraError(f"{where} has no section `sweep`: give one, or run the recipe with `camera run`")
    if recipe.sweep.publish == "best" and recipe.publish.require is None:
        raise CameraError(
            f"{where}: sweep.publish: best is the smallest member that meets publish.require: give that too"
        )
    content = recipe.model_dump(mode="json", exclude={"sweep"})
    _check_values(content, recipe.sweep, where)
    return Sweep(recipe, tuple(_members(content, recipe.name, recipe.sweep, where)))


def _check_values(content: dict[str, Any], sweep: SweepOptions, where: str) -> None:
    """Refuse values that are wrong in every combination, by their place in the lists."""
    wrong = [
        f"  sweep.{list_name}.{index}: {reason}"
        for key, (list_name, values) in sweep.axes.items()
        for index, value in enumerate(values)
        for name, reason in wrong_fields(_with(content, {key: value})).items()
        if name == key or name.startswith(f"{key}.")
    ]
    if wrong:
        raise CameraError("\n".join([f"{where}: {len(wrong)} value(s) of the sweep are wrong:", *wrong]))


def _members(content: dict[str, Any], name: str, sweep: SweepOptions, where: str) -> Iterator[Member]:
    axes = [list(zip(values, _words(key, values), strict=True)) for key, (_, values) in sweep.axes.items()]
    for choice in product(*axes):
        varied = {key: value for key, (value, _) in zip(sweep.axes, choice, strict=True)}
        words = [word for _, word in choice]
        full_name = "-".join([name, *words])
        changes = {"name": full_name, **varied, "publish.enabled": sweep.publish == "all"}
        recipe = check_recipe(_with(content, changes), f"{where}, member {full_name}")
        yield Member(full_name, " ".join(words), varied, recipe)


def _with(content: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    changed = deepcopy(content)
    for key, value in changes.items():
        put(changed, key, value)
    return changed


def _words(key: str, values: tuple[Any, ...]) -> list[str]:
    """Each value in a word that a name can hold, and no two the same."""
    field_name = key.rpartition(".")[2]

    def word(value: Any) -> str:
        if key == "prune.ratio":
            return f"p{100 * value:g}"
        if key == "prune.reduce_ratio":
            return f"a{value:g}"
        text = _NOT_IN_NAMES.sub("-", str(value)).strip("-")
        return text if key in _PLAIN else f"{field_name}-{text}"

    found = [word(value) for value in values]
    if len(set(found)) < len(found) or any(isinstance(value, dict | list | tuple) for value in values):
        return [f"{field_name}-{index + 1}" for index in range(len(values))]
    return found


@dataclass
class MemberPlan:
    """What is known of a member before it runs."""

    member: Member
    pipeline: Pipeline | None
    problem: str | None = None
    """Why it cannot run; the others do."""
    steps: dict[str, str] = field(default_factory=dict)
    """By step: `cached`, `run`, or `shared` with a member before it that runs it."""


def plan_sweep(sweep: Sweep, store: Store) -> list[MemberPlan]:
    """The pipelines of all members, and which of their steps are in the store, shared, or still to run.

    Raises:
        CameraError: if the model or a text is missing.
    """
    plans = []
    sources: dict[tuple[str, ...], Sources] = {}
    seen: set[str] = set()
    for member in sweep.members:
        given = _sources_key(member.recipe)
        if given not in sources:
            sources[given] = find_sources(member.recipe)
        try:
            pipeline = build_pipeline(member.recipe, sources[given])
            held = stored(pipeline, store)
            check_end(pipeline, [step.name for step in pipeline.steps if step.name not in held], store)
            if sweep.options.publish == "best":
                publish.check_place(member.recipe.publish, member.name, store)
        except CameraError as error:
            plans.append(MemberPlan(member, None, str(error)))
            continue
        keys = expected_keys(pipeline)
        steps = {
            name: "cached" if name in held else "shared" if key in seen else "run"
            for name, key in keys.items()
        }
        seen |= set(keys.values())
        plans.append(MemberPlan(member, pipeline, steps=steps))
    return plans


def _sources_key(recipe: Recipe) -> tuple[str, ...]:
    paths = [recipe.calibration.path, *(text.path for text in recipe.evaluate.datasets)]
    tasks = (recipe.evaluate.task_folder, *recipe.evaluate.tasks)
    return (recipe.model, str(recipe.revision), *map(str, (*paths, *tasks)))


def expected_keys(pipeline: Pipeline) -> dict[str, str]:
    """Keys by step if every artifact's content were its key: two steps with one of these do the same work."""

    def pretend(request: Request) -> Artifact:
        return Artifact(Path(), {"stage": request.stage.name, "key": request.key, "digest": request.key})

    resolved = resolve(pipeline, pretend)
    return {name: each.artifact.key for name, each in resolved.items() if each.artifact is not None}


def stored(pipeline: Pipeline, store: Store) -> dict[str, Artifact]:
    """The artifacts that the store has, by step, as far as their inputs are known. Believes their manifests."""

    def look(request: Request) -> Artifact | None:
        name = request.stage.name, request.key
        return store.peek(*name) or store.evicted(*name)

    resolved = resolve(pipeline, look)
    return {name: each.artifact for name, each in resolved.items() if each.artifact is not None}


def sweep_key(sweep: Sweep, plans: list[MemberPlan]) -> str:
    """Identity of a sweep: what its members ask for, and of which sources. Same key, same MLflow run."""
    members = {plan.member.name: None if plan.pipeline is None else plan.pipeline.key for plan in plans}
    return digest_json({"sweep": sweep.recipe.name, "members": members, "publish": sweep.options.publish})


def executions(plans: list[MemberPlan]) -> dict[str, Counter[str]]:
    """By step's name: how often it is cached, shared and run over all members."""
    counts: dict[str, Counter[str]] = {}
    for plan in plans:
        for name, state in plan.steps.items():
            counts.setdefault(name, Counter())[state] += 1
    return counts
