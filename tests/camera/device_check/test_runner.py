"""Each step is a process with a time-out and a verdict; what passed is taken by the next run."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from camera.device_check.plan import STEPS
from camera.device_check.runner import _Check, _why, check
from camera.device_check.schema import CheckReport, StepRecord
from camera.errors import CameraError
from camera.options import CheckOptions
from tests.camera.device_check.toy import runs, toy
from tests.conftest import REPOSITORY

CPU = CheckOptions(device="cpu", tiny=True)


def checked(out: Path, *steps: object, options: CheckOptions = CPU) -> dict[str, StepRecord]:
    return {each.name: each for each in check(options, out, steps=steps).steps}  # type: ignore[arg-type]


def test_what_passed_is_taken_and_the_rest_is_tried_again(tmp_path: Path) -> None:
    steps = (toy("good", "pass"), toy("bad", "miss"))
    for _ in range(2):
        found = checked(tmp_path, *steps)
        assert [found[name].verdict for name in ("good", "bad")] == ["passed", "failed"]
    assert (runs(tmp_path, "good"), runs(tmp_path, "bad")) == (1, 2)
    checked(tmp_path, *steps, options=CPU.model_copy(update={"again": ("good",)}))
    assert runs(tmp_path, "good") == 2


def test_other_options_make_another_result(tmp_path: Path) -> None:
    for options in (CPU, CheckOptions(device="cpu", quick=True)):
        checked(tmp_path, toy("good", "pass"), options=options)
    assert runs(tmp_path, "good") == 2


def test_another_build_makes_another_result_of_the_recipes(tmp_path: Path) -> None:
    steps = [step for step in STEPS if step.asks == "model"]
    assert [step.name for step in steps] == ["recipe", "reference"]
    for number in (1, 2):
        (tmp_path / f"build{number}").mkdir()
    for step in steps:
        for option in ("llama_cpp", "llama_cpp_stock"):
            keys = set()
            for build in (None, tmp_path / "build1", tmp_path / "build2"):
                options = CheckOptions(device="cpu", tiny=True, model=tmp_path).model_copy(
                    update={option: build}
                )
                keys.add(_Check(options, tmp_path / "check", lambda step, record: None)._key(step))
            assert len(keys) == 3


def test_a_step_that_crashes_is_failed_and_the_next_goes_on(tmp_path: Path) -> None:
    found = checked(tmp_path, toy("bad", "crash"), toy("after", "pass"), toy("above", "pass", "bad"))
    assert found["bad"].verdict == "failed"
    assert "SIGSEGV" in found["bad"].cause
    assert found["bad"].measurements[0].value == 3  # what it had found until then
    assert found["after"].verdict == "passed"
    assert (found["above"].verdict, found["above"].reason) == ("skipped", "stands on others")
    assert "Fatal Python error" in (tmp_path / "logs" / "bad.log").read_text()


def test_a_step_that_hangs_is_ended_and_the_next_goes_on(tmp_path: Path) -> None:
    found = checked(tmp_path, toy("bad", "hang", seconds=6), toy("after", "pass"))
    assert (found["bad"].verdict, found["bad"].cause) == ("timed out", "did not end within its time of 6 s")
    assert found["after"].verdict == "passed"


def test_an_error_has_its_cause_and_what_to_do(tmp_path: Path) -> None:
    found = checked(tmp_path, toy("bad", "raise"), toy("slow", "fall back"), toy("miss", "miss"))
    assert "libhccl.so" in found["bad"].cause
    assert "set_env.sh" in found["bad"].advice
    assert "will fall back to run on the CPU" in found["slow"].cause
    assert found["miss"].cause == "1 of 3 do not hold: error: 2 is more than 1"


def test_a_figure_that_is_no_number_is_a_failure_with_a_reason(tmp_path: Path) -> None:
    found = checked(tmp_path, toy("bad", "miscompute"))["bad"]
    assert found.cause == (
        "4 of 5 do not hold: error: nan came out; time: inf came out; forgotten: has no value; and 1 more"
    )
    assert [one.value for one in found.measurements] == [3, None, None, None, 1]
    [low] = found.values("sum")
    assert _why(low) == "1 is less than 2"


def test_a_killed_check_takes_its_step_along_and_the_next_goes_on_there(tmp_path: Path) -> None:
    code = f"""
        from pathlib import Path
        from camera.device_check.runner import check
        from camera.options import CheckOptions
        from tests.camera.device_check.toy import toy
        steps = (toy("good", "pass"), toy("long", "hang"))
        check(CheckOptions(device="cpu", tiny=True), Path({str(tmp_path)!r}), steps=steps)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        start_new_session=True,
    )
    wait_until(lambda: runs(tmp_path, "long") == 1)
    [step] = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until(lambda: not step.is_running() or step.status() == psutil.STATUS_ZOMBIE)
    found = checked(tmp_path, toy("good", "pass"), toy("long", "pass"))
    assert {each.verdict for each in found.values()} == {"passed"}
    assert (runs(tmp_path, "good"), runs(tmp_path, "long")) == (1, 2)


def wait_until(true: object, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        assert time.monotonic() < until
        time.sleep(0.1)


def test_what_does_not_apply_or_was_not_asked_for_is_no_failure(tmp_path: Path) -> None:
    from dataclasses import replace

    steps = (replace(toy("card", "pass"), kinds=("npu",)), replace(toy("model", "pass"), asks="model"))
    report = check(CPU, tmp_path, steps=steps)
    assert isinstance(report, CheckReport)
    assert report.passed
    assert [each.cause for each in report.steps] == ["is for npu", "--model was not given"]


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    thesis = tmp_path / "work" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("mine")
    with pytest.raises(CameraError, match="is not empty, and no check made it: name a new folder"):
        checked(tmp_path, toy("good", "pass"))
    assert [path.name for path in tmp_path.iterdir()] == ["work"]
    assert thesis.read_text() == "mine"


def test_an_unknown_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CameraError, match="again: nonsense is none of host, imports"):
        check(CPU.model_copy(update={"again": ("nonsense",)}), tmp_path)


def test_every_step_stands_on_earlier_ones_and_all_fit_in_forty_minutes() -> None:
    seen: set[str] = set()
    for step in STEPS:
        assert set(step.needs) <= seen, step.name
        seen.add(step.name)
    assert sum(step.seconds for step in STEPS if step.asks is None) <= 40 * 60
