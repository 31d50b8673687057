"""docs/library.md does what it shows."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import camera
from tests.conftest import REPOSITORY
from tests.flows.conftest import write_text
from tests.tiny import tiny_checkpoint

EXAMPLES = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "library.md").read_text(), re.DOTALL)


def test_the_page_runs_from_its_first_example_to_its_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_checkpoint(tmp_path / "model")
    write_text(tmp_path / "calibration.txt", 2000, 1)
    write_text(tmp_path / "held-out.txt", 800, 2)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for example in EXAMPLES:
        exec(compile(example, "docs/library.md", "exec"), names)
    assert camera.open_checkpoint("model").layer_count == 2


def test_every_function_that_import_camera_offers_is_on_the_page() -> None:
    shown = "\n".join(EXAMPLES)
    functions = {name for name in camera.__all__ if name.islower()}
    assert {name for name in functions if f"camera.{name}(" not in shown} == set()
    assert all(getattr(camera, name) for name in camera.__all__)


def test_import_camera_brings_nothing_heavy() -> None:
    code = (
        "import camera, sys; print([m for m in ('torch', 'pydantic', 'numpy', 'typer') if m in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"
