"""A sweep is a plan: every combination of its lists as a recipe of its own, and what the combinations share."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from camera.errors import CameraError
from tasks.pipeline import build_pipeline
from tasks.recipe import Recipe, load_recipe
from tasks.sources import find_sources
from tasks.store import Store
from tasks.sweep import Sweep, executions, expected_keys, load_sweep, plan_sweep, sweep_key
from tests.tasks.conftest import MakeRecipe


@pytest.fixture
def load(recipe: MakeRecipe, tmp_path: Path) -> Any:
    """A sweep of the tiny recipe; keyword arguments replace or extend sections."""

    def make(sweep: dict[str, Any] | None, *overrides: str, **sections: Any) -> Sweep:
        content = recipe(**sections).model_dump(mode="json")
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump({**content, "sweep": sweep}), encoding="utf-8")
        return load_sweep(path, overrides)

    return make


def test_every_combination_is_a_member_named_after_what_varies(load: Any) -> None:
    sweep = load({"ratios": [0.35, 0.7], "types": ["q4_0", "q8_0"]})
    assert [member.name for member in sweep.members] == [
        "tiny-p35-q4_0",
        "tiny-p35-q8_0",
        "tiny-p70-q4_0",
        "tiny-p70-q8_0",
    ]
    last = sweep.members[-1]
    assert (last.recipe.prune.ratio, last.recipe.quantize.type) == (0.7, "q8_0")
    assert last.recipe.sweep is None
    assert sweep.axes == ("prune.ratio", "quantize.type")


def test_any_field_that_makes_a_model_can_vary(load: Any) -> None:
    grid = {"calibration.samples": [2, 3], "quantize.overrides": [{}, {"lm_head.weight": "f16"}]}
    sweep = load({"grid": grid})
    assert [member.label for member in sweep.members] == [
        "samples-2 overrides-1",
        "samples-2 overrides-2",
        "samples-3 overrides-1",
        "samples-3 overrides-2",
    ]
    assert sweep.members[3].recipe.quantize.overrides == {"lm_head.weight": "f16"}


def test_a_member_is_the_sweeps_recipe_with_its_values(load: Any, tmp_path: Path) -> None:
    sweep = load(
        {"ratios": [0.35, 1e-05], "grid": {"capture.propagate": ["one-shot"], "quantize.output_type": [None]}}
    )
    for member in sweep.members:
        varied = [f"{key}={json.dumps(value)}" for key, value in member.varied.items()]
        alone = ["sweep=null", f"name={member.name}", "publish.enabled=false", *varied]
        assert load_recipe(tmp_path / "sweep.yaml", alone) == member.recipe == member.to_run()
    child = sweep.members[0].to_run(parent="0f3a", publish=True)
    assert child.tracking.parent == "0f3a"
    assert child.publish.enabled


def test_a_member_travels_as_json(load: Any) -> None:
    for member in load({"ratios": [0.35, 1e-05]}).members:
        assert (
            Recipe.model_validate(json.loads(json.dumps(member.recipe.model_dump(mode="json"))))
            == member.recipe
        )


def test_members_are_published_only_where_all_are_to_be(load: Any) -> None:
    require = {"perplexity_increase": 1}
    for publish, enabled in (("none", False), ("best", False), ("all", True)):
        sweep = load({"ratios": [0.35], "publish": publish}, publish={"require": require})
        assert sweep.members[0].recipe.publish.enabled is enabled


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        ({"ratios": [0.2, 1.2]}, r"sweep\.ratios\.1: 1.2 is not below 1"),
        ({"ratios": []}, r"sweep\.ratios: is empty"),
        ({"ratios": ["many"]}, r"sweep\.ratios\.0: .*valid number"),
        ({"types": ["q4_0", "q5_0"]}, r"sweep\.types\.1: "),
        ({"ratio": [0.2]}, r"sweep\.ratio: no such field; known here: ratios"),
        ({"grid": {"prune.ration": [0.2]}}, r"sweep\.grid\.prune\.ration\.0: no such field; known here: ratio"),
        ({"grid": {"prune.multiple_of": [32, -1]}}, r"sweep\.grid\.prune\.multiple_of\.1: .*greater than 0"),
        ({"grid": {"evaluate.window": [32]}}, r"sweep\.grid: evaluate\.window cannot vary"),
        ({"grid": {"prune": [{}]}}, r"sweep\.grid: prune cannot vary"),
        ({"ratios": [0.2], "grid": {"prune.ratio": [0.3]}}, r"sweep: ratios and grid\.prune\.ratio are the same"),
        ({"ratios": [0.2, 0.2]}, r"sweep: ratios gives prune\.ratio the value 0\.2 twice"),
        ({}, r"sweep: varies nothing"),
        ({"ratios": [0.2], "publish": "best"}, r"sweep\.publish: .*publish\.require"),
        (None, r"no section `sweep`"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_with_its_path(load: Any, sweep: dict[str, Any], words: str) -> None:
    with pytest.raises(CameraError, match=words):
        load(sweep)


def test_a_combination_that_cannot_be_is_refused_by_name(load: Any) -> None:
    with pytest.raises(CameraError, match=r"member tiny-q4_0: [\s\S]*quantize: a twin is of type q4_0_64"):
        load({"types": ["q4_0_64", "q4_0"]}, quantize={"twin": "q4_0"})


def test_an_override_reaches_every_member_and_the_lists(load: Any) -> None:
    sweep = load({"ratios": [0.35]}, "sweep.ratios=[0.7]", "calibration.seed=3")
    assert [member.name for member in sweep.members] == ["tiny-p70"]
    assert sweep.members[0].recipe.calibration.seed == 3


def test_a_recipe_with_lists_is_no_run(load: Any) -> None:
    sweep = load({"ratios": [0.35]})
    with pytest.raises(CameraError, match="camera sweep"):
        build_pipeline(sweep.recipe, find_sources(sweep.recipe))


def test_one_shot_members_share_all_but_what_their_options_change(load: Any, tmp_path: Path) -> None:
    sweep = load({"ratios": [0.35, 0.7], "types": ["q4_0", "q8_0"]}, capture={"propagate": "one-shot"})
    counts = executions(plan_sweep(sweep, Store(tmp_path / "store")))
    runs = {name: count["run"] for name, count in counts.items()}
    assert {name for name, count in runs.items() if count == 4} == {
        "quantize", "convert", "evaluate pruned+quantized story", "benchmark", "report",
    }  # fmt: skip
    assert {name for name, count in runs.items() if count == 2} == {"prune", "save", "evaluate pruned story"}
    shared_by_all = {name for name, count in runs.items() if count == 1}
    assert {"capture", "score", "convert baseline", "evaluate original story"} <= shared_by_all
    assert counts["capture"] == {"run": 1, "shared": 3}


def test_a_sequential_capture_is_not_shared_by_ratios(load: Any, tmp_path: Path) -> None:
    sweep = load({"ratios": [0.35, 0.7]}, capture={"propagate": "sequential"})
    assert executions(plan_sweep(sweep, Store(tmp_path / "store")))["capture"]["run"] == 2


def test_a_member_that_cannot_run_says_why_and_leaves_the_others(load: Any, tmp_path: Path) -> None:
    plans = plan_sweep(load({"ratios": [0.05, 0.35]}), Store(tmp_path / "store"))
    assert "nothing would be pruned" in str(plans[0].problem)
    assert plans[1].problem is None
    assert plans[1].pipeline is not None
    assert set(plans[1].steps) == set(expected_keys(plans[1].pipeline))


def test_a_sweeps_key_follows_its_members_and_not_how_they_run(load: Any, tmp_path: Path) -> None:
    def key(sweep: Sweep) -> str:
        return sweep_key(sweep, plan_sweep(sweep, Store(tmp_path / "store")))

    first = key(load({"ratios": [0.35, 0.7]}))
    assert key(load({"ratios": [0.35, 0.7], "workers": 4})) == first
    assert key(load({"ratios": [0.35]})) != first
    assert key(load({"ratios": [0.35, 0.7]}, calibration={"seed": 1})) != first
