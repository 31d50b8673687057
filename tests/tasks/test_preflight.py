"""Before a run it is known what would run, and whether there is room."""

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from dvc.repo import Repo

from camera.errors import CameraError
from tasks.pipeline import Pipeline, build_pipeline
from tasks.preflight import check_end, check_room, plan
from tasks.sources import find_sources
from tasks.stage import perform
from tasks.store import Artifact, Store
from tasks.sweep import plan_sweep, sweep_of
from tests.tasks.conftest import MakeRecipe, flip

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def pipeline(recipe: MakeRecipe) -> Pipeline:
    return build(recipe)


def build(recipe: MakeRecipe, **sections: dict[str, object]) -> Pipeline:
    checked = recipe(**sections)
    return build_pipeline(checked, find_sources(checked))


def states(pipeline: Pipeline, store: Store) -> dict[str, str]:
    return {planned.step.name: planned.state for planned in plan(pipeline, store)}


def run(pipeline: Pipeline, store: Store, last: str) -> dict[str, Artifact]:
    done: dict[str, Artifact] = {}
    for step in pipeline.steps:
        done[step.name] = perform(store, step.request(done))
        if step.name == last:
            break
    return done


def test_in_an_empty_store_what_waits_for_nothing_runs_and_the_rest_after(
    pipeline: Pipeline, store: Store
) -> None:
    found = states(pipeline, store)
    assert list(found) == [step.name for step in pipeline.steps]
    running = {name for name, state in found.items() if state == "run"}
    assert running == {"fetch calibration", "quantize baseline", "fetch story"}
    assert set(found.values()) == {"run", "after"}


def test_what_the_store_has_is_cached_and_the_next_step_runs(pipeline: Pipeline, store: Store) -> None:
    run(pipeline, store, "score")
    found = states(pipeline, store)
    assert [found[name] for name in ("fetch calibration", "capture", "score")] == ["cached"] * 3
    assert (found["prune"], found["save"]) == ("run", "after")


def test_a_damaged_artifact_is_planned_to_run(pipeline: Pipeline, store: Store) -> None:
    done = run(pipeline, store, "score")
    flip(done["capture"].path / "statistics.safetensors")
    found = states(pipeline, store)
    assert (found["fetch calibration"], found["capture"], found["score"]) == ("cached", "run", "after")


def test_planning_runs_and_writes_nothing(pipeline: Pipeline, store: Store) -> None:
    plan(pipeline, store)
    assert not store.root.exists()


def test_a_changed_recipe_keeps_what_it_may(recipe: MakeRecipe, pipeline: Pipeline, store: Store) -> None:
    run(pipeline, store, "prune")
    found = states(build(recipe, quantize={"type": "q4_0"}), store)
    assert (found["prune"], found["save"]) == ("cached", "run")
    found = states(build(recipe, prune={"ratio": 0.7}), store)
    assert (found["fetch calibration"], found["capture"]) == ("cached", "run")


def test_every_step_has_an_estimate(pipeline: Pipeline, store: Store) -> None:
    for planned in plan(pipeline, store):
        assert planned.disk_bytes >= 0
        assert planned.memory_bytes > 0


def test_the_estimates_are_near_what_is_then_written(pipeline: Pipeline, store: Store) -> None:
    estimates = {planned.step.name: planned.disk_bytes for planned in plan(pipeline, store)}
    done = run(pipeline, store, "convert baseline")
    for name in ("save", "quantize", "quantize baseline"):
        weights = sum(path.stat().st_size for path in done[name].path.glob("*.safetensors"))
        assert estimates[name] == pytest.approx(weights, rel=0.15), name


def test_a_full_disk_is_refused_with_the_numbers(
    pipeline: Pipeline, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_room(pipeline, store)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 10**12 - 1000, 1000))
    with pytest.raises(CameraError) as caught:
        check_room(pipeline, store)
    message = str(caught.value)
    assert str(store.root) in message
    assert "1 kB free" in message
    assert "needs about" in message
    assert "CAMERA_HOME" in message


def test_a_run_whose_steps_are_all_in_the_store_needs_no_room(
    recipe: MakeRecipe, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = build(recipe, publish={"enabled": False})
    run(pipeline, store, "report")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 10**12, 0))
    check_room(pipeline, store)


def test_what_a_killed_stage_already_wrote_is_not_asked_for_again(
    pipeline: Pipeline, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def message() -> str:
        with pytest.raises(CameraError) as caught:
            check_room(pipeline, store)
        return str(caught.value)

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 10**12, 0))
    before = message()
    step = next(step for step in pipeline.steps if step.name == "quantize baseline")
    working = store.working("quantize", step.request({}).key)
    working.mkdir(parents=True)
    fill(working, 50_000)
    assert message() != before


@pytest.mark.parametrize("content", ["", "[]", "{}"])
def test_a_damaged_manifest_is_room_to_be_found_and_no_reason_to_stop(
    pipeline: Pipeline, store: Store, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run(pipeline, store, "capture")
    manifest = done["capture"].path / "manifest.json"
    manifest.chmod(0o644)
    manifest.write_text(content)
    check_room(pipeline, store)
    assert states(pipeline, store)["capture"] == "run"


def test_what_other_recipes_left_in_the_store_is_no_room(
    pipeline: Pipeline, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with store.lock("key"):
        store.make("other", "key", lambda folder: fill(folder, 10 << 20), {}, {}, resumes=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 10**12 - 1000, 1000))
    with pytest.raises(CameraError, match="needs about"):
        check_room(pipeline, store)


def fill(folder: Path, size: int) -> dict[str, float]:
    (folder / "x").write_bytes(bytes(size))
    return {}


@pytest.mark.parametrize("content", ["a file", "another model", "our own", "empty"])
def test_only_a_place_of_our_own_is_published_to(
    pipeline: Pipeline, store: Store, tmp_path: Path, content: str
) -> None:
    target = tmp_path / "published" / "tiny"
    target.mkdir(parents=True)
    if content == "a file":
        (target / "thesis.tex").write_text("years of work")
    elif content != "empty":
        name = "tiny" if content == "our own" else "huge"
        (target / "lineage.json").write_text(f'{{"name": "{name}"}}')
    if content in ("our own", "empty"):
        check_room(pipeline, store)
        return
    with pytest.raises(CameraError, match=f"{target} exists with other content"):
        check_room(pipeline, store)


@pytest.mark.parametrize("lineage", ["[]", "{", "3", '{"name": null}'])
def test_a_place_with_a_lineage_that_is_not_ours_is_refused_in_words(
    pipeline: Pipeline, store: Store, tmp_path: Path, lineage: str
) -> None:
    target = tmp_path / "published" / "tiny"
    target.mkdir(parents=True)
    (target / "lineage.json").write_text(lineage)
    with pytest.raises(CameraError):
        check_room(pipeline, store)


def test_a_file_in_the_place_is_refused(pipeline: Pipeline, store: Store, tmp_path: Path) -> None:
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "tiny").write_text("mine")
    with pytest.raises(CameraError, match="exists with other content"):
        check_room(pipeline, store)


def test_a_method_with_new_matrices_is_estimated_with_them(recipe: MakeRecipe, store: Store) -> None:
    plain = {planned.step.name: planned for planned in plan(build(recipe), store)}
    refit = {planned.step.name: planned for planned in plan(build(recipe, prune={"method": "refit"}), store)}
    assert plain["capture"].seconds is not None
    assert refit["capture"].seconds is not None
    assert refit["capture"].disk_bytes > plain["capture"].disk_bytes
    assert refit["prune"].disk_bytes > plain["prune"].disk_bytes == 0


def test_a_quantisation_that_calibrates_is_estimated_with_its_walk_and_moments(
    recipe: MakeRecipe, store: Store
) -> None:
    def needs(**quantize: object) -> tuple[int, int]:
        planned = plan(build(recipe, quantize={"type": "q4_0", **quantize}), store)
        return next((each.disk_bytes, each.memory_bytes) for each in planned if each.step.name == "quantize")

    plain, search, gptq = needs(), needs(method="search"), needs(method="gptq")
    assert plain[1] < search[1] < gptq[1]
    width = 64  # of the tiny model, pruned or hidden, at least
    assert gptq[1] - search[1] >= 8 * width**2
    assert needs(target_bpw=9.0)[0] == pytest.approx(2 * plain[0], rel=0.01)
    assert needs(target_bpw=9.0)[1] == search[1]


OF_A_RUN = """
import sys
from pathlib import Path
import psutil, torch
import flows.compress, mlflow.tracking
from camera.checkpoints.checkpoint import Checkpoint
from camera.layerwise.runner import LayerRunner
LayerRunner(Checkpoint.open(Path(sys.argv[1])), torch.device("cpu"), torch.float32)
print(psutil.Process().memory_info().rss)
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is not None, reason="the figure is of torch for the CPU")
def test_every_step_is_planned_in_a_process_with_the_libraries_of_a_run(
    pipeline: Pipeline, model: Path, store: Store
) -> None:
    told = subprocess.run([sys.executable, "-c", OF_A_RUN, str(model)], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    libraries = int(told.stdout)
    needed = {planned.step.name: planned.memory_bytes for planned in plan(pipeline, store)}
    assert needed["fetch calibration"] == pytest.approx(libraries, rel=0.15)
    # of a model this small hardly more, whether a step was tried or counted
    assert needed["capture"] == pytest.approx(needed["fetch calibration"], rel=0.02)
    assert needed["save"] == pytest.approx(needed["fetch calibration"], rel=0.02)
    assert needed["benchmark"] - needed["save"] > 500e6  # its memory is read to see how fast that goes


# What the last steps would refuse


@pytest.fixture
def unconvertible(model: Path) -> Path:
    """A model that every step before `convert` takes."""
    path = model / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}))
    return model


def test_a_model_of_which_there_is_no_gguf_file_is_refused_before_the_first_step(
    unconvertible: Path, recipe: MakeRecipe, store: Store
) -> None:
    pipeline = build(recipe)
    with pytest.raises(CameraError, match=f"{unconvertible}.*dynamic"):
        check_room(pipeline, store)
    with pytest.raises(CameraError, match=f"{unconvertible}.*dynamic"):
        check_end(pipeline, ["convert"])
    assert check_end(pipeline, ["capture", "report"]) == []


def test_a_folder_that_git_ignores_is_refused_before_the_first_step(
    recipe: MakeRecipe, store: Store, tmp_path: Path
) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    subprocess.run(["git", "init", "-q", "."], cwd=repository, check=True)
    with Repo.init(str(repository)):
        pass
    pipeline = build(recipe, publish={"folder": str(repository / "published"), "dvc": True})
    check_room(pipeline, store)
    for ignored, refused in (("published/\n", True), ("published/*\n!published/*.dvc\n", False)):
        (repository / ".gitignore").write_text(ignored)
        if not refused:
            check_room(pipeline, store)
            continue
        with pytest.raises(
            CameraError, match=r"gitignore leaves out published/tiny\.dvc.*`!published/\*\.dvc`"
        ):
            check_room(pipeline, store)


def test_a_member_of_a_sweep_that_cannot_end_is_not_begun(
    unconvertible: Path, recipe: MakeRecipe, store: Store
) -> None:
    (plan,) = plan_sweep(sweep_of(recipe(sweep={"ratios": [0.35], "publish": "none"}), "test"), store)
    assert plan.pipeline is None
    assert plan.problem is not None
    assert str(unconvertible) in plan.problem
