"""Processes of trials and what is kept of them. Here they compute nothing; tests/npu holds trials on the real torch_npu."""

import json
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from camera.engines.parts import int4_trials
from camera.engines.parts.int4_trial import Key, Shape, Trial, Variant
from camera.engines.parts.int4_trials import TrialsError, cache_file, fastest, try_layouts

SHAPES = [Shape(128, 512, 64), Shape(256, 512, 64)]
PROGRAM = """
import os, sys, time
from camera.engines.parts import int4_trials
from camera.engines.parts.int4_trial import Trial

class Bench:
    def __init__(self, device):
        pass

    def trial(self, key):
        if key.rows == 128 and key.tokens == 4:
            {fault}
        return Trial(**key._asdict(), microseconds=key.tokens)

int4_trials.resolve_device, int4_trials.TrialBench = str, Bench
int4_trials.work(int(sys.argv[1]))
"""


class Worker:
    """In the place of a process."""

    started = 0

    def __init__(self, device: torch.device) -> None:
        Worker.started += 1

    def ask(self, key: Key) -> Trial:
        if key.layout == "transposed":
            return key.failed("off by 9 %")
        return Trial(**key._asdict(), microseconds=key.tokens)

    def close(self) -> None:
        """Nothing is held."""


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(npu: types.ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(int4_trials.platformdirs, "user_cache_path", lambda name: tmp_path / name)
    monkeypatch.setattr(int4_trials, "facts", lambda: host("9.1.0"))
    monkeypatch.setattr(int4_trials, "VARIANTS", (Variant("plain", 0),))


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> type[Worker]:
    monkeypatch.setattr(int4_trials, "_Worker", Worker)
    Worker.started = 0
    return Worker


def host(cann: str) -> types.SimpleNamespace:
    """Of `camera.ascend.host.facts`, what kernels depend on."""
    return types.SimpleNamespace(torch="2.10.0", torch_npu="2.10.0", cann=cann, driver=None)


def tried(shapes: Sequence[Shape], **options: Any) -> list[Trial]:
    return try_layouts(shapes, torch.device("npu", 0), **options)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("raise RuntimeError('vector core exception')", "RuntimeError: vector core exception"),
        ("print('trap', flush=True); os.kill(os.getpid(), 11)", "its process ended with -11: trap"),
        ("time.sleep(60)", "its process gave no answer for 3 s"),
    ],
)
def test_a_variant_that_fails_loses_its_shape_and_no_other(
    monkeypatch: pytest.MonkeyPatch, fault: str, reason: str
) -> None:
    monkeypatch.setattr(int4_trials, "_TRIAL_SECONDS", 3)
    monkeypatch.setattr(int4_trials, "_END_SECONDS", 0.1)
    monkeypatch.setattr(int4_trials, "_PROGRAM", PROGRAM.format(fault=fault))
    trials = tried(SHAPES)
    errors = {(trial.rows, trial.tokens): trial.error for trial in trials}
    lost = {(128, 4): reason, (128, 16): f"failed with 4 tokens: {reason}"}
    assert errors == dict.fromkeys(errors) | lost
    assert len(errors) == 2 * 3


def test_a_variant_that_loses_two_processes_is_given_up(
    worker: type[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = [Shape(rows, 512, 64) for rows in (64, 128, 192, 256)]
    monkeypatch.setattr(Worker, "ask", lambda self, key: "vector core exception")
    errors = [trial.error for trial in tried(shapes, tokens=(1,))]
    assert worker.started == 2
    assert errors[:2] == ["vector core exception"] * 2
    assert all("not tried: 2 shapes failed" in str(error) for error in errors[2:])


def test_a_failure_that_another_user_of_the_card_may_cause_is_not_kept(
    worker: type[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int4_trials, "VARIANTS", (Variant("plain", 0), Variant("transposed", 0)))
    monkeypatch.setattr(
        Worker,
        "ask",
        lambda self, key: (
            key.failed("NPU out of memory")
            if key.layout == "transposed"
            else Trial(**key._asdict(), microseconds=1)
        ),
    )
    tried(SHAPES)
    kept = json.loads(cache_file({"card": "Ascend910B1"}).read_text())["trials"]
    assert {trial["layout"] for trial in kept} == {"plain"}


def test_a_fresh_try_that_cannot_start_keeps_what_was_known(
    worker: type[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tried(SHAPES)

    def refuses(self: Worker, device: torch.device) -> None:
        raise TrialsError("no process for trials can be started")

    monkeypatch.setattr(Worker, "__init__", refuses)
    with pytest.raises(TrialsError):
        tried(SHAPES, fresh=True)
    assert tried(SHAPES) == first


def test_what_was_found_is_read_the_second_time_and_forgotten_with_a_new_version(
    worker: type[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tried(SHAPES)
    assert tried(SHAPES) == first
    assert worker.started == 1
    tried([*SHAPES, Shape(64, 512, 64)])  # only the new shape
    assert worker.started == 2
    monkeypatch.setattr(int4_trials, "facts", lambda: host("9.2.0"))
    tried(SHAPES)
    assert worker.started == 3
    tried(SHAPES, fresh=True)
    assert worker.started == 4


def test_a_damaged_file_is_tried_again_and_written_anew(worker: type[Worker]) -> None:
    file = cache_file({"card": "Ascend910B1"})
    file.parent.mkdir()
    file.write_text('{"identity": {}, "trials": [{"layout"')
    found = tried(SHAPES)
    assert worker.started == 1
    kept = json.loads(file.read_text())
    assert kept["identity"]["cann"] == "9.1.0"
    assert [Trial(**trial) for trial in kept["trials"]] == found


def test_shapes_for_which_nothing_was_right_are_not_kept(
    worker: type[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int4_trials, "VARIANTS", (Variant("transposed", 0),))
    assert {trial.error for trial in tried(SHAPES)} == {"off by 9 %"}
    assert json.loads(cache_file({"card": "Ascend910B1"}).read_text())["trials"] == []


def test_processes_that_cannot_open_the_device_are_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int4_trials, "_PROGRAM", "raise SystemExit('libhccl.so: cannot be opened')")
    with pytest.raises(TrialsError, match=r"ended with 1: libhccl.so: cannot be opened"):
        tried(SHAPES)


def test_a_layout_that_does_not_take_a_shape_needs_no_process(
    worker: type[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int4_trials, "VARIANTS", (Variant("tiled", 0),))
    (trial,) = tried([Shape(128, 512, 32)], tokens=(1,))
    assert trial.error == "the tiled layout takes groups of 64 or 128, not 32"
    assert worker.started == 0


def test_a_time_with_its_launch_does_not_beat_a_recorded_one() -> None:
    shape = Shape(64, 128, 64)

    def trial(layout: str, microseconds: float, recorded: bool) -> Trial:
        key = Key(layout, 0, *shape, 1)
        return Trial(**key._asdict(), microseconds=microseconds, recorded=recorded)

    launched, slow, fast = trial("plain", 1, False), trial("tiled", 3, True), trial("transposed", 2, True)
    assert fastest([launched, slow, fast], shape) == fast
    assert fastest([launched], shape) == launched
