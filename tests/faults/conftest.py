"""A small project, run in processes that are forked from a server and may be killed."""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tasks.store import Store
from tests.faults.work import TOLD, run_recipe
from tests.flows.conftest import write_text
from tests.forked import FORKED
from tests.tiny import tiny_checkpoint


def start(act: Callable[..., None], *arguments: Any, **named: Any) -> Any:
    """A process of its own that acts."""
    process = FORKED.Process(target=act, args=arguments, kwargs=named)
    process.start()
    return process


def ended(process: Any, seconds: float = 300) -> int:
    """The exit code of a process; negative: the signal that ended it."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        pytest.fail(f"still at work after {seconds} seconds")
    return int(process.exitcode)


@dataclass(frozen=True)
class Project:
    """A folder with model, texts and recipe, and what its runs left."""

    folder: Path

    @property
    def store(self) -> Store:
        return Store(self.folder / ".camera" / "store")

    @property
    def published(self) -> Path:
        return self.folder / "published" / "tiny"

    def start(self, **named: Any) -> Any:
        (self.folder / TOLD).unlink(missing_ok=True)
        return start(run_recipe, self.folder, **named)

    def run(self, **named: Any) -> int:
        """Run the recipe to whatever end; the exit code."""
        return ended(self.start(**named))

    @property
    def told(self) -> dict[str, Any]:
        """What the last run said of itself; the one that a kill ended said nothing."""
        return self.told_as(TOLD)

    def told_as(self, name: str) -> dict[str, Any]:
        """What the run that was to use this name said."""
        told: dict[str, Any] = json.loads((self.folder / name).read_text())
        return told

    def whole(self) -> dict[str, str]:
        """Content digest of every artifact that is there, by stage and key; each is what its manifest says."""
        found = {}
        for path in sorted(self.store.root.glob("[!.]*/[!.]*")):
            stage, key = path.parent.name, path.name
            assert self.store.damage(stage, key) is None
            found[f"{stage}/{key}"] = self.store.open(stage, key).digest
        return found

    def output(self) -> str:
        return (self.folder / "output.txt").read_text()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random openPangu checkpoint in bf16, in two shards."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return tiny_checkpoint(folder, "PanguEmbedded", shards=2, dtype=torch.bfloat16)


def lay_out(folder: Path, model: Path) -> Project:
    """Put model, texts and recipe into a folder."""
    shutil.copytree(model, folder / "model")
    write_text(folder / "calibration.txt", 2000, 1)
    write_text(folder / "held-out.txt", 400, 2)
    recipe = {
        "name": "tiny",
        "model": "model",
        "calibration": {"name": "file", "path": "calibration.txt", "samples": 3, "length": 32},
        "capture": {"dtype": "float32", "batch_size": 2, "device": "cpu", "propagate": "sequential"},
        "prune": {"ratio": 0.4},
        "quantize": {"twin": "q4_0"},
        "evaluate": {
            "datasets": [{"name": "file", "path": "held-out.txt"}],
            "window": 32,
            "max_windows": 2,
            "dtype": "float32",
            "device": "cpu",
        },
        "benchmark": {"decode": [2], "repeats": 1, "device": "cpu"},
        "tracking": {"enabled": False},
        "publish": {"dvc": False},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return Project(folder)


@pytest.fixture
def project(tmp_path: Path, model: Path) -> Project:
    """A project in which nothing ran yet."""
    return lay_out(tmp_path, model)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Project:
    """A project whose recipe ran to its end. Not to be changed: see `copied`."""
    done = lay_out(tmp_path_factory.mktemp("undisturbed"), model)
    assert done.run() == 0, done.output()
    return done


@pytest.fixture
def copied(undisturbed: Project, tmp_path: Path) -> Project:
    """A copy of the project whose recipe ran to its end."""
    shutil.copytree(undisturbed.folder, tmp_path / "copy", copy_function=shutil.copy2)
    copy = Project(tmp_path / "copy")
    assert copy.run() == 0, copy.told["error"]  # where it is published is a part of what was asked for
    return copy


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Make file systems of so many bytes; skipped where mounting is not allowed."""
    mounted: list[Path] = []

    def make(size: int) -> Path:
        place = tmp_path / f"disk-{len(mounted)}"
        place.mkdir()
        mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place))
        mounted.append(place)
        return place

    yield make
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)


def mount(*arguments: str) -> None:
    """Mount, or skip the test where that is not allowed."""
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
