"""The hardest question to a lineage: does its recipe, run again from nothing, give the same bytes?"""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from camera.errors import CameraError
from tasks.audit.finding import Finding, unverifiable, verified, wrong
from tasks.lineage import environment
from tasks.pipeline import Pipeline, build_pipeline
from tasks.plan import execute
from tasks.recipe import check_recipe
from tasks.sources import find_sources
from tasks.stage import Request, Step, perform
from tasks.store import Artifact, Store
from tasks.tracking import flatten

NAME = "rebuilt from nothing"
_COMPARED = (".gguf", ".safetensors")


def rebuild(
    lineage: dict[str, Any], room: Path, started: Callable[[str], None] = lambda step: None
) -> Finding:
    """Run the stages up to the GGUF in a clean store, and compare the weights with what was published.

    Args:
        lineage: of a published folder. Relative paths of its recipe are relative to the working directory.
        room: a folder with space for the clean store, which is deleted afterwards.
        started: told of every step.
    """
    content = {**lineage["recipe"], "tracking": {"enabled": False}, "publish": {"enabled": False}}
    try:
        recipe = check_recipe(content, "the recipe in the lineage")
        pipeline = build_pipeline(recipe, find_sources(recipe)).up_to("convert", "save")
    except CameraError as error:
        return unverifiable(NAME, f"its recipe cannot be run here: {error}", "absent")
    room.mkdir(parents=True, exist_ok=True)
    others: list[str] = []

    def made(step: Step, request: Request) -> Artifact:
        started(step.name)
        others.extend(_other_request(step, request, lineage))
        return perform(store, request)

    with TemporaryDirectory(prefix="rebuild-", dir=room) as folder:
        store = Store(Path(folder))
        done = execute(pipeline, made)
        found = {
            name: str(entry["sha256"])
            for step in ("save", "convert")
            for name, entry in done[step].manifest["files"].items()
            if name.endswith(_COMPARED)
        }
    return _verdict(found, lineage, [*dict.fromkeys([*others, *_other_versions(lineage, pipeline)])])


def _verdict(found: dict[str, str], lineage: dict[str, Any], others: list[str]) -> Finding:
    expected = {name: value for name, value in lineage["files"].items() if name.endswith(_COMPARED)}
    differ = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if not differ:
        although = f", although made with others: {'; '.join(others)}" if others else ""
        return verified(NAME, f"{len(found)} files of weights are the same, bit for bit{although}")
    detail = f"{', '.join(differ)} came out differently"
    if others:
        return unverifiable(NAME, f"{detail}; made with others: {'; '.join(others)}", "other versions")
    return wrong(NAME, f"{detail}, with the same code, versions and kind of machine")


def _other_request(step: Step, request: Request, lineage: dict[str, Any]) -> list[str]:
    """How a step as it is asked for here differs from what the lineage says was asked for."""
    if request.key in lineage["stages"]:
        return []
    then = next((entry for entry in lineage["stages"].values() if entry["step"] == step.name), None)
    if then is None:
        return [f"step {step.name}: was not there"]
    found = []
    if then["version"] != step.stage.version:
        found.append(f"stage {step.stage.name}: version {step.stage.version}, was {then['version']}")
    before = flatten(then["options"]) | (then.get("facts") or {})
    after = flatten(request.options.identity()) | request.facts
    for name in sorted(before.keys() | after.keys()):
        if (was := before.get(name)) != (now := after.get(name)):
            found.append(f"{step.name}: {name} {now}, was {was}")
    for name in sorted(then["inputs"].keys() | request.inputs.keys()):
        was = then["inputs"].get(name, {})
        given = request.inputs.get(name)
        if given is None or (given.key is None and was.get("digest") != given.digest):
            found.append(f"{step.name}: input {name} is another here")
    return found


def _other_versions(lineage: dict[str, Any], pipeline: Pipeline) -> list[str]:
    """Which versions differ between what the stages ran with and this machine."""
    names = {step.name for step in pipeline.steps}
    found: dict[str, None] = {}
    for entry in lineage["stages"].values():
        then = entry.get("environment")
        if entry["step"] not in names or then is None:
            continue
        here = environment(then.get("device"))
        for field in ("camera", "python", "machine", "commit"):
            if then[field] != here[field] or (field == "commit" and str(then[field]).endswith("+")):
                found[f"{field} {here[field]}, was {then[field]}"] = None
        for package in sorted(then["packages"].keys() | here["packages"].keys()):
            was, now = then["packages"].get(package), here["packages"].get(package)
            if was != now:
                found[f"{package} {now or 'missing'}, was {was or 'missing'}"] = None
    return list(found)
