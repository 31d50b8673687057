"""What is interchangeable is found by name: in its package, and in other distributions."""

import sys
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import TypeAdapter, ValidationError

from camera.errors import CameraError
from camera.registry import NameIn, Registry


def package(folder: Path, name: str, **modules: str) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(
        f'from camera.registry import Registry\nSHAPES = Registry("shape", "{name}")\n'
    )
    for module, text in modules.items():
        (folder / name / f"{module}.py").write_text(f"from {name} import SHAPES\n{text}\n")


def shapes(name: str) -> Registry[int]:
    return __import__(name).SHAPES  # type: ignore[no-any-return]


def test_every_module_of_the_package_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, "shapes_a", square="SHAPES.register('square', 4)", line="SHAPES.register('line', 2)")
    monkeypatch.syspath_prepend(tmp_path)
    assert dict(shapes("shapes_a")) == {"line": 2, "square": 4}


def test_another_distribution_adds_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, "shapes_b")
    (tmp_path / "more_b.py").write_text("from shapes_b import SHAPES\nSHAPES.register('star', 10)\n")
    info = tmp_path / "more_b-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: more_b\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[camera]\nmore = more_b\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert list(shapes("shapes_b")) == ["star"]
    sys.modules.pop("more_b")


def test_an_unknown_name_is_refused_with_those_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(tmp_path, "shapes_c", square="SHAPES.register('square', 4)", line="SHAPES.register('line', 2)")
    monkeypatch.syspath_prepend(tmp_path)
    registry = shapes("shapes_c")
    with pytest.raises(CameraError, match="unknown shape 'cube': known are line, square"):
        registry["cube"]
    with pytest.raises(ValidationError, match="unknown shape 'cube': known are line, square"):
        TypeAdapter(Annotated[str, NameIn(registry)]).validate_python("cube")
    assert TypeAdapter(Annotated[str, NameIn(registry)]).validate_python("line") == "line"


def test_two_entries_of_one_name_are_refused() -> None:
    registry: Registry[int] = Registry("shape", "tests")
    registry.register("line", 2)
    with pytest.raises(ValueError, match="two shapes are called line"):
        registry.register("line", 3)
