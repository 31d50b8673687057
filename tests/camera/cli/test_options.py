"""Flags that are made from option models."""

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
import typer
from typer.testing import CliRunner

from camera.cli.options import Flags, stage_command
from camera.cli.stages import Stage
from camera.errors import CameraError
from camera.options import CalibrationOptions, CaptureOptions, EvaluateOptions, PruneOptions, QuantizeOptions
from camera.progress import Progress, silent


def command_of(function: Any, **flags: Flags) -> Any:
    names = [name for name in inspect.signature(function).parameters if name != "progress"]
    function.__doc__ = "Do it.\n\nArgs:\n" + "".join(f"    {name}: what it is.\n" for name in names)
    return stage_command(Stage(function, lambda result, values: None, flags=flags))


def called(function: Any, *arguments: str, **flags: Flags) -> Any:
    """Call the command of a function with a command line."""
    app = typer.Typer()
    app.command()(command_of(function, **flags))
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_a_field_is_a_flag_and_the_command_gets_the_model() -> None:
    seen: list[PruneOptions] = []

    def command(options: PruneOptions, progress: Progress) -> None:
        seen.append(options)

    called(command, "--ratio", "0.4", "--mode", "mask")
    called(command)
    assert seen == [PruneOptions(ratio=0.4, mode="mask"), PruneOptions()]


def test_every_choice_default_and_help_is_the_fields() -> None:
    def command(options: CaptureOptions, progress: Progress) -> None: ...

    parameters = inspect.signature(command_of(command)).parameters
    assert set(parameters) == {"propagate", "batch_size", "dtype", "device", "nproc", "preset", "context"}
    kind, option = get_args(parameters["propagate"].annotation)
    assert kind == Literal["one-shot", "sequential"]
    assert parameters["propagate"].default == "sequential"
    assert option.help.startswith("`one-shot`: statistics of the original model.")
    assert get_args(parameters["batch_size"].annotation)[1].help == "Samples that go through a layer at once."


def test_a_command_may_take_some_fields_with_its_own_defaults() -> None:
    seen: list[CaptureOptions] = []

    def command(options: CaptureOptions, progress: Progress) -> None:
        seen.append(options)

    own = Flags("propagate", propagate="one-shot")
    called(command, options=own)
    called(command, "--propagate", "sequential", options=own)
    assert [options.propagate for options in seen] == ["one-shot", "sequential"]
    assert called(command, "--batch-size", "2", options=own).exit_code == 2


def test_a_wrong_value_is_named_by_its_flag() -> None:
    def prune(options: PruneOptions, progress: Progress) -> None: ...

    with pytest.raises(CameraError, match=r"^--ratio: 1.2 is not below 1"):
        called(prune, "--ratio", "1.2")

    def quantize(options: QuantizeOptions, progress: Progress) -> None: ...

    with pytest.raises(CameraError, match="--target-bpw: "):
        called(quantize, "--target-bpw", "-1")
    with pytest.raises(CameraError, match="--override x: write PATTERN=VALUE"):
        called(quantize, "--override", "x")


def test_lists_may_be_repeated_or_hold_commas_and_pairs_make_a_dictionary() -> None:
    seen: list[Any] = []

    def evaluate(options: EvaluateOptions, progress: Progress) -> None:
        seen.append(options.tasks)

    called(evaluate, "--tasks", "boolq, rte", "--tasks", "piqa")

    def quantize(options: QuantizeOptions, progress: Progress) -> None:
        seen.append(options.overrides)

    called(quantize, "--override", "*.down_proj.weight=q8_0", "--override", "lm_head.weight=f16")
    assert seen == [("boolq", "rte", "piqa"), {"*.down_proj.weight": "q8_0", "lm_head.weight": "f16"}]


def test_a_dataset_is_one_flag_and_none_of_its_flags_is_no_dataset() -> None:
    seen: list[CalibrationOptions | None] = []

    def command(calibration: "CalibrationOptions | None" = None, progress: Progress = silent) -> None:
        seen.append(calibration)

    called(command)
    called(command, "--calibration", "wikitext2", "--samples", "4")
    called(command, "--calibration", "text.jsonl", "--field", "content")
    called(command, "--samples", "4")
    file = CalibrationOptions(name="file", path=Path("text.jsonl"), field="content")
    assert seen == [
        None,
        CalibrationOptions(name="wikitext2", samples=4),
        file,
        CalibrationOptions(samples=4),
    ]

    def required(calibration: CalibrationOptions, progress: Progress) -> None: ...

    assert "Missing option '--calibration'" in called(required).output


def test_two_models_with_one_flag_are_a_mistake_of_the_command() -> None:
    def command(capture: CaptureOptions, quantize: QuantizeOptions, progress: Progress) -> None: ...

    with pytest.raises(TypeError, match="two flags --"):
        command_of(command)


def test_a_removed_flag_says_what_to_write_instead() -> None:
    command = [sys.executable, "-m", "camera", "prune", "model", "out", "--steps=2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr.startswith("camera: --steps was removed: leave it out")) == (
        2,
        True,
    )


def calibrated(*arguments: str) -> tuple[CalibrationOptions | None, PruneOptions]:
    """What a command with two sections gets from a command line."""
    seen: list[tuple[CalibrationOptions | None, PruneOptions]] = []

    def command(
        calibration: CalibrationOptions | None = None,
        prune: PruneOptions | None = None,
        progress: Progress = silent,
    ) -> None:
        seen.append((calibration, prune or PruneOptions()))

    called(command, *arguments)
    return seen[0]


def test_a_preset_is_below_every_flag_that_is_given() -> None:
    calibration, prune = calibrated("--preset", "ascend-reference", "--samples", "8", "--ratio", "0.4")
    assert calibration == CalibrationOptions(name="wikitext2", samples=8, length=1024, seed=1234)
    assert prune == PruneOptions(ratio=0.4)


def test_a_flag_with_its_usual_value_is_above_a_preset_as_well() -> None:
    calibration, _ = calibrated("--preset", "ascend-reference", "--seed", "0", "--length", "2048")
    assert calibration is not None
    assert (calibration.seed, calibration.length, calibration.samples) == (0, 2048, 16)


def test_a_text_of_ones_own_is_above_the_presets(tmp_path: Path) -> None:
    calibration, _ = calibrated("--preset", "ascend-reference", "--calibration", str(tmp_path / "mine.txt"))
    assert calibration is not None
    assert (calibration.name, calibration.path, calibration.seed) == ("file", tmp_path / "mine.txt", 1234)


def test_without_a_preset_nothing_changes() -> None:
    assert calibrated() == (None, PruneOptions())
