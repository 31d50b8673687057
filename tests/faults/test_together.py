"""Several at once: of one recipe, of two that share stages, of one place; and a clock that nobody can trust."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tasks.stages import publish
from tests.conftest import REPOSITORY
from tests.faults.conftest import Project, ended, lay_out, start
from tests.faults.test_kill import before
from tests.faults.work import run_recipe
from tests.flows.steps import STEPS

pytestmark = pytest.mark.faults


def test_two_runs_of_one_recipe_do_the_work_once(tmp_path: Path, model: Path) -> None:
    project = lay_out(tmp_path, model)
    runs = [start(run_recipe, project.folder, told=name) for name in ("one.json", "two.json")]
    assert [ended(run) for run in runs] == [0, 0], project.output()
    one, two = (project.told_as(name)["states"] for name in ("one.json", "two.json"))
    made = [(one[step] == "done") + (two[step] == "done") for step in STEPS]
    assert made == [1] * len(STEPS), "each stage was carried out by one of them"
    assert publish.damage(project.published) is None


def test_two_recipes_share_the_stages_that_they_have_in_common(tmp_path: Path, model: Path) -> None:
    project = lay_out(tmp_path, model)
    ratios = {"one.json": (), "two.json": ("name=other", "prune.ratio=0.7")}
    runs = [
        start(run_recipe, project.folder, overrides=overrides, told=name)
        for name, overrides in ratios.items()
    ]
    assert [ended(run) for run in runs] == [0, 0], project.output()
    states = [project.told_as(name)["states"] for name in ratios]
    for step in ("fetch calibration", "quantize baseline", "fetch held-out", "evaluate original held-out"):
        assert sorted(state[step] == "done" for state in states) == [False, True], step
    for name in ("tiny", "other"):
        assert publish.damage(project.folder / "published" / name) is None


def test_two_models_of_one_name_are_published_one_after_the_other(
    undisturbed: Project, tmp_path: Path
) -> None:
    project = before(undisturbed, "publish", tmp_path / "project")
    again = ("prune.ratio=0.7",)
    assert project.run(overrides=(*again, "publish.enabled=false")) == 0, project.told["error"]
    for _ in range(3):
        runs = [project.start(overrides=overrides) for overrides in ((), again)]
        assert [ended(run) for run in runs] == [0, 0], project.output()
        assert publish.damage(project.published) is None
        assert [path.name for path in project.published.parent.iterdir()] == ["tiny"]


def prune(project: Project, out: Path, *more: str) -> "subprocess.Popen[str]":
    paths = [
        str(project.folder / "model"),
        str(out),
        "--calibration",
        str(project.folder / "calibration.txt"),
    ]
    options = ["--ratio", "0.4", "--samples", "4", "--length", "64", "--device", "cpu", *more]
    return subprocess.Popen(
        [sys.executable, "-m", "camera", "prune", *paths, *options],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_of_two_prunes_to_one_place_the_second_is_told_and_the_first_goes_on(project: Project) -> None:
    out = project.folder / "out"
    first = prune(project, out)
    lock = project.folder / ".out.lock"
    while not (lock.exists() and lock.read_text()):
        assert first.poll() is None, first.communicate()
        time.sleep(0.005)
    first.send_signal(signal.SIGSTOP)  # it is at work as long as we look
    second = prune(project, out)
    said = second.communicate(timeout=300)[1]
    assert second.returncode == 2
    assert f"{out} is being made by another process ({first.pid}): wait until it ends" in said
    first.send_signal(signal.SIGKILL)
    first.communicate()

    third = prune(project, out)
    assert third.communicate(timeout=300)[1] == ""
    assert third.returncode == 0, "the lock of the killed one is free"
    assert not lock.exists()
    assert not (project.folder / ".out.partial").exists()


@pytest.mark.parametrize("years", [-30, 30])
def test_no_time_on_any_file_decides_what_is_redone(copied: Project, years: int) -> None:
    then = time.time() + years * 365 * 86400
    for path in copied.folder.rglob("*"):
        os.utime(path, (then, then), follow_symlinks=False)
    assert copied.run() == 0
    assert set(copied.told["states"].values()) == {"cached"}


def test_a_killed_run_resumes_whatever_the_times_of_its_files(undisturbed: Project, tmp_path: Path) -> None:
    project = before(undisturbed, "quantize", tmp_path / "project")
    assert project.run(step="quantize", number=80) == -9
    for number, path in enumerate(sorted(project.folder.rglob("*"))):
        os.utime(path, (1e9 * (number % 3), 1e9 * (number % 3)), follow_symlinks=False)
    assert project.run() == 0, project.told["error"]
    assert all(project.told["states"][step] == "cached" for step in STEPS[: STEPS.index("quantize")])
    quantized = {name: digest for name, digest in undisturbed.whole().items() if name.startswith("quantize")}
    assert quantized.items() <= project.whole().items()
