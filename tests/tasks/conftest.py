"""A project in miniature: a tiny openPangu checkpoint, a text, a recipe over both, and a store."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from camera.options import Options
from tasks.estimate import Needs
from tasks.options import Sections
from tasks.pipeline import Pipeline
from tasks.recipe import Recipe, check_recipe
from tasks.stage import Context, Stage
from tasks.store import Artifact, Store
from tests.fake_npu import npu
from tests.tiny import tiny_checkpoint

if TYPE_CHECKING:
    from tests.tasks.publications import Publication

__all__ = ["npu"]


class WordOptions(Options):
    """What a stage of a test is asked with."""

    word: str = ""
    layers: tuple[int, ...] = ()


def toy_stage(name: str, run: Callable[[Context], dict[str, float]], version: int = 1) -> Stage:
    """A stage of a test alone."""
    return Stage(name, version, run, {"toy": WordOptions}, needs=lambda known: Needs(), intermediate=False)


def toy_options(**values: Any) -> Sections:
    """What it is asked with."""
    return Sections(toy=WordOptions(**values))


WORDS = "The keeper climbed the narrow stairs each evening to light the great lamp above the sea. "


@pytest.fixture(scope="session")
def pangu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny openPangu-Embedded checkpoint that must not be changed."""
    return tiny_checkpoint(tmp_path_factory.mktemp("pangu") / "model", "PanguEmbedded")


@pytest.fixture
def model(pangu: Path, tmp_path: Path) -> Path:
    """A copy of it that may be changed."""
    return Path(shutil.copytree(pangu, tmp_path / "model"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text file long enough to calibrate and to measure on."""
    path = tmp_path / "story.txt"
    path.write_text("".join(f"{number}. {WORDS}" for number in range(60)), encoding="utf-8")
    return path


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def recipe(model: Path, text: Path, tmp_path: Path) -> MakeRecipe:
    """A recipe over the tiny model and the text; keyword arguments replace or extend whole sections."""

    def make(**sections: dict[str, Any] | str) -> Recipe:
        content: dict[str, Any] = {
            "name": "tiny",
            "model": str(model),
            "calibration": {"name": "file", "path": str(text), "samples": 3, "length": 32},
            "capture": {"batch_size": 2, "device": "cpu"},
            "prune": {"ratio": 0.35},
            "evaluate": {
                "datasets": [{"name": "file", "path": str(text)}],
                "window": 64,
                "max_windows": 2,
                "device": "cpu",
            },
            "benchmark": {"decode": [2], "repeats": 1, "device": "cpu"},
            "tracking": {"enabled": False},
            "publish": {"folder": str(tmp_path / "published"), "dvc": False},
        }
        for name, section in sections.items():
            if isinstance(section, dict):
                content[name] = {**content.get(name, {}), **section}
            else:
                content[name] = section
        return check_recipe(content, "test")

    return make


def flip(path: Path, at: int = -1) -> None:
    """Flip one bit of a file, as a failing disk would: without a word to who owns it."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


@pytest.fixture(scope="session")
def two_publications(tmp_path_factory: pytest.TempPathFactory) -> "Publication":
    """Made once; whoever damages them mends them."""
    from tests.tasks.publications import publish_two

    return publish_two(tmp_path_factory.mktemp("two publications"))


@pytest.fixture
def tiny(two_publications: "Publication", monkeypatch: pytest.MonkeyPatch) -> Iterator["Publication"]:
    """The publication, mended after every edit."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{two_publications.root / 'no database.db'}")
    monkeypatch.chdir(two_publications.root)
    yield two_publications
    two_publications.mend()


@pytest.fixture(scope="session")
def database_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One MLflow database per test process: making it takes seconds."""
    return tmp_path_factory.mktemp("mlflow") / "mlflow.db"


@pytest.fixture
def database(database_file: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The tracking URI in use."""
    uri = f"sqlite:///{database_file}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


class Quiet:
    """A listener that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []

    def begin(self, pipeline: Pipeline) -> None:
        self.told.append(("begin", pipeline.recipe.name))

    def started(self, step: str) -> None:
        self.told.append(("started", step))

    def waiting(self, step: str) -> None:
        self.told.append(("waiting", step))

    def progress(self, step: str, done: int, total: int) -> None:
        pass

    def finished(self, step: str, artifact: Artifact, cached: bool) -> None:
        self.told.append(("cached" if cached else "finished", step))

    def failed(self, step: str, error: BaseException) -> None:
        self.told.append(("failed", step))
