"""The command, on a real model that is small enough."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow


def run_command(cells: Path, *options: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "benchmarks/quality.py", "--models", "stories260k", "--cells", str(cells)]
    command += ["--ratios", "0.4", "--seeds", "0", "--samples", "12", "--length", "128", "--windows", "4"]
    command += ["--items", "4", "--threads", "1", "--third", str(cells.with_name("third")), *options]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), **variables}
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment, check=False, capture_output=True, text=True
    )


def test_what_was_measured_is_kept_and_printed_again_without_measuring(
    shared_data: Path, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    cells, out = tmp_path / "cells", tmp_path / "quality.json"
    options = "--methods", "wanda-sp", "refit", "--json", str(out), "--plot", str(tmp_path / "quality.png")
    first = run_command(cells, *options)
    assert first.returncode in (0, 1), first.stderr
    assert "No calibration window shares 13 words" in first.stdout
    kept, content = set(cells.iterdir()), json.loads(out.read_text())
    assert len(kept) == 2 * 4, "texts and tasks of dense, CAMERA-P, and the two that were asked for"
    assert [row["method"] for row in content["rows"]] == ["wanda-sp", "camera 0.95", "refit"]
    assert {row["width"] for row in content["rows"]} == {104}
    missed = any(goal["met"] is False for goal in content["goals"])
    assert first.returncode == int(missed)
    second = run_command(cells, *options, "--kept")
    assert (second.stdout, second.returncode) == (first.stdout, first.returncode)
    assert set(cells.iterdir()) == kept


def test_without_the_shared_data_the_model_is_skipped_by_name(tmp_path: Path) -> None:
    finished = run_command(tmp_path / "cells", CAMERA_SHARED_DATA=str(tmp_path / "absent"))
    assert finished.returncode == 2
    assert "stories260k is skipped" in finished.stderr
    assert "CAMERA_SHARED_DATA" in finished.stderr
