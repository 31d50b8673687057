"""The two installs: a wheel with the library alone, a checkout with the pipeline; and what they depend on."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import camera
from camera.cli import PIPELINE_COMMANDS
from tests.conftest import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
PINS_FOR_OTHERS = {"fastapi"}
"""Declared for a bound that another dependency needs and does not state: docs/dependencies.md."""
PART_OF = {"pydantic-core": "pydantic"}
"""Distributions that are versioned together with the one that is declared."""


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built from a copy."""
    source = tmp_path_factory.mktemp("source")
    for room in ("camera", "tasks", "flows"):
        shutil.copytree(REPOSITORY / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    made = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-c", build, made], cwd=source, check=True, capture_output=True)
    (found,) = made.glob("*.whl")
    return found


def installed_from(wheel: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line as somebody does who has only the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    environment = os.environ | {"PYTHONPATH": str(folder / "site"), "COLUMNS": "80"}
    command = [sys.executable, "-m", "camera", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_wheel_holds_the_library_alone_with_its_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    info = f"camera_npu-{camera.__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"camera", info}
    assert f"{info}/licenses/LICENSE" in names
    assert {"camera/py.typed", "camera/report/report.html.j2", "camera/cli/__init__.py"} <= set(names)


def test_without_a_checkout_a_pipeline_command_says_where_it_is_used(wheel: Path, tmp_path: Path) -> None:
    refused = installed_from(wheel, tmp_path, "run", "recipe.yaml")
    assert refused.returncode == 2
    assert refused.stderr.startswith("camera: camera run is a command of the pipeline")
    assert "pip install -e '.[pipeline]'" in refused.stderr
    shown = installed_from(wheel, tmp_path, "--help").stdout
    assert " prune " in shown
    assert "from a checkout" in " ".join(shown.split())


def test_every_pipeline_command_is_known_to_the_library() -> None:
    from flows.commands import PANELS

    joined = [command.__name__ for commands in PANELS.values() for command in commands]
    assert sorted(joined) == sorted(PIPELINE_COMMANDS)


def distributions(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w.-]", each)[0].lower().replace("_", "-") for each in requirements}


def imported(*rooms: str) -> dict[str, set[str]]:
    """Distributions by the top-level name that a room imports: any of them may be meant."""
    provided = packages_distributions()
    tops = set()
    for path in (path for room in rooms for path in (REPOSITORY / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                tops |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                tops.add((node.module or "").partition(".")[0])
    outside = tops - set(sys.stdlib_module_names) - {"camera", "tasks", "flows"}
    return {top: {name.lower().replace("_", "-") for name in provided.get(top, [top])} for top in outside}


LIGHT = distributions(PROJECT["dependencies"])
EXTRAS = {name: distributions(each) for name, each in PROJECT["optional-dependencies"].items()}
ROOMS = {
    "camera": (("camera",), LIGHT | EXTRAS["llama"] | EXTRAS["tasks"]),
    "tasks and flows": (("tasks", "flows"), LIGHT | EXTRAS["pipeline"]),
}


@pytest.mark.parametrize("room", ROOMS)
def test_every_import_is_a_declared_dependency(room: str) -> None:
    rooms, declared = ROOMS[room]
    undeclared = {
        top
        for top, names in imported(*rooms).items()
        if not {PART_OF.get(name, name) for name in names} & {each.replace("_", "-") for each in declared}
    }
    assert undeclared == set()


def test_every_dependency_is_imported() -> None:
    used = set().union(*imported("camera").values())
    assert LIGHT - used == set()
    used |= set().union(*imported("tasks", "flows").values())
    assert EXTRAS["pipeline"] - used - PINS_FOR_OTHERS == set()


def test_the_version_is_written_once() -> None:
    assert PROJECT["dynamic"] == ["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", camera.__version__)
