"""Kill -9 and power cuts at thirty points over all stages: what was finished stays, what follows ends the same."""

import json
import random
import shutil
from pathlib import Path

import pytest

from tasks.stages import publish
from tests.faults.conftest import Project
from tests.flows.steps import STEPS

pytestmark = pytest.mark.faults

_MEASURES_TIME = ("benchmark", "report", "publish")
"""Times differ from run to run, and so does what is made of them."""


def points() -> list[tuple[str, float, bool]]:
    """A step, where in it, and whether the power fails: once in each step, and more where a stage resumes inside."""
    chance = random.Random(20261124)
    steps = STEPS + ["capture"] * 2 + ["prune"] * 2 + ["quantize"] * 3 + ["save"] * 2 + ["publish"] * 4
    return [(step, chance.random(), number % 2 == 1) for number, step in enumerate(steps)]


POINTS = points()


def before(done: Project, step: str, folder: Path) -> Project:
    """A copy of a project as it was when a step was about to start."""
    shutil.copytree(done.folder, folder, copy_function=shutil.copy2)
    copy = Project(folder)
    for later in STEPS[STEPS.index(step) :]:
        for manifest in copy.store.root.glob("[!.]*/*/manifest.json"):
            if json.loads(manifest.read_text())["step"] == later:
                shutil.rmtree(manifest.parent)
    shutil.rmtree(folder / "published", ignore_errors=True)
    return copy


@pytest.mark.parametrize(
    ("step", "where", "power"),
    POINTS,
    ids=[f"{number}-{step}-{'power' if power else 'kill'}" for number, (step, _, power) in enumerate(POINTS)],
)
def test_a_run_that_is_ended_anywhere_goes_on_and_ends_with_the_same_bytes(
    undisturbed: Project, tmp_path: Path, step: str, where: float, power: bool
) -> None:
    project = before(undisturbed, step, tmp_path / "project")
    number = 1 + int(where * undisturbed.told["operations"][step])
    assert project.run(step=step, number=number, power=power) == -9
    finished = project.whole()
    assert not project.published.exists() or publish.damage(project.published) is None

    assert project.run() == 0, project.told["error"] + project.output()
    states = project.told["states"]
    done_before = STEPS[: STEPS.index(step)]
    assert {name for name in done_before if states[name] != "cached"} == set()
    after = project.whole()
    assert {name: after[name] for name in finished} == finished, "what was finished is not made again"
    steady = {name: digest for name, digest in undisturbed.whole().items() if timeless(name)}
    assert {name: digest for name, digest in after.items() if timeless(name)} == steady
    assert publish.damage(project.published) is None
    for name in ("model-00001-of-00002.safetensors", "config.json", "tiny-q4_0_64.gguf"):
        assert (project.published / name).read_bytes() == (undisturbed.published / name).read_bytes()
    hidden = [path.name for path in project.published.parent.iterdir() if path.name.startswith(".")]
    assert hidden == [], "no half publication is left"
    assert project.run() == 0
    assert set(project.told["states"].values()) == {"cached"}


def timeless(name: str) -> bool:
    return not name.startswith(_MEASURES_TIME)
