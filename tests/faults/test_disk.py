"""Disks that are full, read-only or not to be trusted, for real: small file systems, mounts, damaged bytes."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.stages import publish
from tests.conftest import REPOSITORY
from tests.faults.conftest import Project, ended, mount, start
from tests.faults.test_kill import before
from tests.flows.steps import STEPS
from tests.tasks.conftest import flip

pytestmark = pytest.mark.faults

SmallDisk = Callable[[int], Path]


def fill_up(disk: Path, but: int) -> Path:
    """Leave so many bytes free on a file system; the file that takes the rest."""
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - but)
    return ballast


@pytest.mark.parametrize("step", [step for step in STEPS if step not in ("score", "convert baseline")])
def test_a_full_disk_ends_the_step_in_words_and_the_run_goes_on_once_there_is_room(
    undisturbed: Project, tmp_path: Path, small_disk: SmallDisk, step: str
) -> None:
    project = before(undisturbed, step, tmp_path / "project")
    disk = small_disk(24 << 20)
    home = project.folder / ".camera"
    shutil.copytree(home, disk / "home")
    shutil.rmtree(home)
    home.symlink_to(disk / "home")
    (disk / "published").mkdir()
    (project.folder / "published").symlink_to(disk / "published")
    finished = project.whole()
    assert project.run(fill=str(disk), step=step) == 1

    told = project.told
    assert told["kind"] == "DiskError", project.output() + told["error"]
    assert f"the disk at {disk} is full" in told["error"]
    assert "Free some space and run the same command again" in told["error"]
    assert "The steps that are left write about" in told["error"]
    assert told["states"][step] == "failed"
    assert project.whole() == finished
    assert not project.published.exists() or publish.damage(project.published) is None

    (disk / "ballast").unlink()
    assert project.run() == 0, project.told["error"]
    assert all(project.told["states"][name] == "cached" for name in STEPS[: STEPS.index(step)])
    assert publish.damage(project.published) is None


def test_a_disk_that_is_too_small_is_said_before_the_first_step(
    project: Project, small_disk: SmallDisk
) -> None:
    disk = small_disk(1 << 20)
    (project.folder / ".camera").symlink_to(disk)
    fill_up(disk, but=100_000)
    assert project.run() == 1
    assert "this recipe needs about" in project.told["error"]
    assert project.told["states"] == {}


def prune_into(model: Path, calibration: Path, out: Path) -> subprocess.CompletedProcess[str]:
    options = ["--ratio", "0.4", "--samples", "2", "--length", "32", "--device", "cpu"]
    paths = [str(model), str(out), "--calibration", str(calibration)]
    return subprocess.run(
        [sys.executable, "-m", "camera", "prune", *paths, *options],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_camera_prune_on_a_full_disk_says_so_and_goes_on(project: Project, small_disk: SmallDisk) -> None:
    disk = small_disk(4 << 20)
    ballast = fill_up(disk, but=60_000)
    arguments = (project.folder / "model", project.folder / "calibration.txt", disk / "out")
    stopped = prune_into(*arguments)
    assert stopped.returncode == 2, stopped.stderr
    assert f"the disk at {disk} is full" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert not (disk / "out").exists()
    ballast.unlink()
    assert prune_into(*arguments).returncode == 0
    assert sorted(path.name for path in disk.iterdir()) == ["out"]


def test_a_complete_store_that_is_read_only_is_used_as_it_is(copied: Project) -> None:
    home = str(copied.folder / ".camera")
    mount("--bind", home, home)
    try:
        mount("-o", "remount,bind,ro", home)
        assert copied.run() == 0, copied.told["error"]
        assert set(copied.told["states"].values()) == {"cached"}
    finally:
        subprocess.run(["umount", home], check=True)


def test_a_store_that_is_read_only_and_lacks_something_says_what_to_do(copied: Project) -> None:
    shutil.rmtree(next(copied.store.root.glob("report/*")))
    home = str(copied.folder / ".camera")
    mount("--bind", home, home)
    try:
        mount("-o", "remount,bind,ro", home)
        assert copied.run() == 1
    finally:
        subprocess.run(["umount", home], check=True)
    assert copied.told["kind"] == "DiskError", copied.told["error"]
    assert "CAMERA_HOME" in copied.told["error"]
    assert "Read-only file system" in copied.told["error"]


def damaged(project: Project, kind: str) -> str:
    """Damage an artifact; the step that made it."""
    (matrices,) = project.store.root.glob("prune/*/layer-0001.safetensors")
    folder = matrices.parent
    if kind == "flipped bit":
        flip(matrices)
    elif kind == "truncated file":
        matrices.chmod(0o644)
        os.truncate(matrices, matrices.stat().st_size // 2)
    elif kind == "missing file":
        matrices.unlink()
    elif kind == "another file":
        (folder / "stray.bin").write_bytes(b"stray")
    elif kind == "missing lineage":
        (folder / "lineage.json").unlink()
    elif kind == "stale temporary":
        (folder / ".layer-0000.safetensors.1.tmp").write_bytes(b"half")
    else:
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").chmod(0o644)
        (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 2}))
    return "prune"


@pytest.mark.parametrize(
    "kind",
    [
        "flipped bit",
        "truncated file",
        "missing file",
        "another file",
        "missing lineage",
        "stale temporary",
        "manifest of another version",
    ],
)
def test_a_damaged_artifact_alone_is_made_again(copied: Project, kind: str) -> None:
    whole = copied.whole()
    step = damaged(copied, kind)
    assert copied.run() == 0, copied.told["error"]
    assert [name for name, state in copied.told["states"].items() if state == "done"] == [step]
    assert copied.whole() == whole


def test_what_a_dead_process_left_in_a_working_folder_does_not_become_content(
    undisturbed: Project, tmp_path: Path
) -> None:
    project = before(undisturbed, "prune", tmp_path / "project")
    key = next(undisturbed.store.root.glob("prune/[!.]*")).name
    working = project.store.working("prune", key)
    working.mkdir(parents=True)
    (working / ".layer-0000.safetensors.999999.tmp").write_bytes(b"half of a layer")
    (working / "layer-0001.safetensors").write_bytes(b"of nobody knows whom")
    assert project.run() == 0
    whole = {name: digest for name, digest in undisturbed.whole().items() if name.startswith("prune/")}
    assert whole.items() <= project.whole().items()


def map_hidden_states(folder: Path, disk: Path) -> None:
    """Ask for room that the disk does not have."""
    import torch

    from camera.disk import explain_disk_errors
    from camera.pruning import passes

    passes._SHARE_OF_FREE = 0.0  # as on a host whose memory is taken
    try:
        with explain_disk_errors(disk):
            room = passes.hidden_room((1 << 12, 1 << 8), torch.float32, torch.device("cpu"), disk, 1)
            room.fill_(1)
    except Exception as error:
        (folder / "said").write_text(f"{type(error).__name__}: {error}")


def test_hidden_states_that_do_not_fit_on_the_disk_are_words_and_no_sigbus(
    tmp_path: Path, small_disk: SmallDisk
) -> None:
    disk = small_disk(1 << 20)
    assert ended(start(map_hidden_states, tmp_path, disk)) == 0, "killed by the system"
    assert f"the disk at {disk} is full" in (tmp_path / "said").read_text()
