"""The whole check on the CPU, at small shapes, by the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from camera.device_check.schema import CheckReport
from tests.conftest import REPOSITORY


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_that_applies_passes_on_the_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "camera", "npu-check", "check", "--device", "cpu", "--tiny", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = CheckReport.model_validate(json.loads(done.stdout))
    assert report.passed
    assert not report.stub
    assert {step.verdict for step in report.steps} == {"passed", "skipped"}
    assert {step.reason for step in report.steps} == {None, "not asked for", "does not apply"}
    decoded = report.step("decode-q4_0")
    assert decoded is not None
    assert decoded.values("time of a token")[0].value
    page = (tmp_path / "check" / "report.html").read_text()
    for title in ("Verdicts", "Time of a token", "gate and up, pruned", "Host time of a launch"):
        assert title in page
    assert str(tmp_path) not in page + (tmp_path / "check" / "report.json").read_text()
    assert list((tmp_path / "check").glob("work")) == []
