"""Flags that are made from option models."""

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pytest
import typer
from typer.testing import CliRunner

from camera.cli.options import Flags, expanded
from camera.errors import CameraError
from camera.options import CalibrationOptions, CaptureOptions, EvaluateOptions, PruneOptions, QuantizeOptions


def called(function: Any, *arguments: str) -> Any:
    """Call a command with a command line."""
    app = typer.Typer()
    app.command()(expanded(function))
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_a_field_is_a_flag_and_the_command_gets_the_model() -> None:
    seen: list[PruneOptions] = []

    def command(options: PruneOptions) -> None:
        seen.append(options)

    called(command, "--ratio", "0.4", "--mode", "mask")
    called(command)
    assert seen == [PruneOptions(ratio=0.4, mode="mask"), PruneOptions()]


def test_every_choice_default_and_help_is_the_fields() -> None:
    def command(options: CaptureOptions) -> None: ...

    parameters = inspect.signature(expanded(command)).parameters
    assert set(parameters) == {"propagate", "batch_size", "dtype", "device", "nproc"}
    kind, option = get_args(parameters["propagate"].annotation)
    assert kind == Literal["one-shot", "sequential"]
    assert parameters["propagate"].default == "sequential"
    assert option.help.startswith("`one-shot`: statistics of the original model.")
    assert get_args(parameters["batch_size"].annotation)[1].help == "Samples that go through a layer at once."


def test_a_command_may_take_some_fields_with_its_own_defaults() -> None:
    seen: list[CaptureOptions] = []

    def command(options: Annotated[CaptureOptions, Flags("propagate", propagate="one-shot")]) -> None:
        seen.append(options)

    called(command)
    called(command, "--propagate", "sequential")
    assert [options.propagate for options in seen] == ["one-shot", "sequential"]
    assert called(command, "--batch-size", "2").exit_code == 2


def test_a_wrong_value_is_named_by_its_flag() -> None:
    def prune(options: PruneOptions) -> None: ...

    with pytest.raises(CameraError, match=r"^--ratio: 1.2 is not below 1"):
        called(prune, "--ratio", "1.2")

    def quantize(options: QuantizeOptions) -> None: ...

    with pytest.raises(CameraError, match="--target-bpw: "):
        called(quantize, "--target-bpw", "-1")
    with pytest.raises(CameraError, match="--override x: write PATTERN=VALUE"):
        called(quantize, "--override", "x")


def test_lists_may_be_repeated_or_hold_commas_and_pairs_make_a_dictionary() -> None:
    seen: list[Any] = []

    def evaluate(options: EvaluateOptions) -> None:
        seen.append(options.tasks)

    called(evaluate, "--tasks", "boolq, rte", "--tasks", "piqa")

    def quantize(options: QuantizeOptions) -> None:
        seen.append(options.overrides)

    called(quantize, "--override", "*.down_proj.weight=q8_0", "--override", "lm_head.weight=f16")
    assert seen == [("boolq", "rte", "piqa"), {"*.down_proj.weight": "q8_0", "lm_head.weight": "f16"}]


def test_a_dataset_is_one_flag_and_none_of_its_flags_is_no_dataset() -> None:
    seen: list[CalibrationOptions | None] = []

    def command(calibration: "CalibrationOptions | None" = None) -> None:
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

    def required(calibration: CalibrationOptions) -> None: ...

    assert "Missing option '--calibration'" in called(required).output


def test_two_models_with_one_flag_are_a_mistake_of_the_command() -> None:
    def command(capture: CaptureOptions, quantize: QuantizeOptions) -> None: ...

    with pytest.raises(TypeError, match="two flags --"):
        expanded(command)


def test_a_removed_flag_says_what_to_write_instead() -> None:
    command = [sys.executable, "-m", "camera", "capture", "model", "out", "--steps=2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr.startswith("camera: --steps was removed: leave it out")) == (
        2,
        True,
    )
