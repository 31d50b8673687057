import inspect
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import ValidationError

from camera import options
from camera.options import (
    BenchmarkOptions,
    CalibrationOptions,
    CaptureOptions,
    DatasetOptions,
    EvaluateOptions,
    Options,
    PruneOptions,
    QuantizeOptions,
    Setting,
    UsedWhen,
)

SECTIONS: list[type[Options]] = [
    section
    for _, section in inspect.getmembers(options, inspect.isclass)
    if issubclass(section, Options) and section is not Options
]


def refused(section: type[Options], **values: Any) -> dict[str, Any]:
    """The one error that these values give."""
    with pytest.raises(ValidationError) as raised:
        section(**values)
    (error,) = raised.value.errors()
    return dict(error)


@pytest.mark.parametrize("section", SECTIONS)
def test_every_section_has_defaults_and_every_field_a_description(section: type[Options]) -> None:
    section()
    for name, field in section.model_fields.items():
        assert field.description, name


@pytest.mark.parametrize("section", SECTIONS)
def test_an_unknown_key_is_refused_by_its_name(section: type[Options]) -> None:
    error = refused(section, rattio=0.2)
    assert error["loc"] == ("rattio",)
    assert error["type"] == "extra_forbidden"


@pytest.mark.parametrize("section", SECTIONS)
def test_options_cannot_be_changed_once_made(section: type[Options]) -> None:
    name = next(iter(section.model_fields))
    made = section()
    with pytest.raises(ValidationError, match="frozen"):
        setattr(made, name, getattr(made, name))


@pytest.mark.parametrize("section", SECTIONS)
def test_options_survive_json(section: type[Options]) -> None:
    assert section.model_validate_json(section().model_dump_json()) == section()


@pytest.mark.parametrize("ratio", [0, 0.2, 0.999])
def test_a_ratio_from_zero_to_below_one_is_taken(ratio: float) -> None:
    assert PruneOptions(ratio=ratio).ratio == ratio


@pytest.mark.parametrize("ratio", [1.0, 1.2, 20, float("inf")])
def test_a_ratio_of_one_or_more_is_refused_in_words(ratio: float) -> None:
    assert f"{float(ratio)} is not below 1" in refused(PruneOptions, ratio=ratio)["msg"]


@pytest.mark.parametrize("ratio", [-0.1, float("nan"), -float("inf"), "a fifth", None])
def test_a_ratio_that_is_no_share_is_refused_by_its_field(ratio: Any) -> None:
    assert refused(PruneOptions, ratio=ratio)["loc"] == ("ratio",)


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        (PruneOptions, "reduce_ratio", 1.01),
        (PruneOptions, "reduce_ratio", -0.01),
        (PruneOptions, "multiple_of", 0),
        (PruneOptions, "multiple_of", 2.5),
        (PruneOptions, "mode", "slice"),
        (CaptureOptions, "propagate", "twice"),
        (CaptureOptions, "batch_size", 0),
        (CaptureOptions, "dtype", "int8"),
        (CalibrationOptions, "samples", 0),
        (CalibrationOptions, "length", -1),
        (CalibrationOptions, "split", "validation"),
        (DatasetOptions, "name", "pile"),
        (QuantizeOptions, "type", "q5_k"),
        (QuantizeOptions, "twin", "q8_0"),
        (EvaluateOptions, "window", 0),
        (EvaluateOptions, "max_windows", 0),
        (BenchmarkOptions, "repeats", 0),
        (BenchmarkOptions, "prompt", 0),
    ],
)
def test_an_impossible_value_is_refused_by_its_field(section: type[Options], field: str, value: Any) -> None:
    assert refused(section, **{field: value})["loc"] == (field,)


def test_an_impossible_value_inside_a_list_or_a_mapping_is_refused_by_its_place() -> None:
    assert refused(BenchmarkOptions, decode=[256, 0])["loc"] == ("decode", 1)
    assert refused(BenchmarkOptions, engines=["torch", "vllm"])["loc"] == ("engines", 1)
    assert refused(QuantizeOptions, overrides={"*.down_proj.weight": "q9"})["loc"] == (
        "overrides",
        "*.down_proj.weight",
    )
    assert refused(EvaluateOptions, datasets=[{"split": "half"}])["loc"] == ("datasets", 0, "split")


@pytest.mark.parametrize("section", [DatasetOptions, CalibrationOptions])
def test_a_path_goes_with_a_file_or_a_copy_and_a_file_with_a_path(section: type[DatasetOptions]) -> None:
    assert section(name="file", path=Path("text.txt")).path == Path("text.txt")
    assert "name `file` needs a path" in refused(section, name="file")["msg"]
    assert section(name="c4", path=Path("c4.jsonl")).path == Path("c4.jsonl")
    assert "name `stdlib` takes no path" in refused(section, name="stdlib", path="text.txt")["msg"]


def test_the_defaults_are_those_of_the_method() -> None:
    assert PruneOptions().identity() == {
        "ratio": 0.2,
        "reduce_ratio": 0.95,
        "mode": "physical",
        "multiple_of": 64,
        "method": "camera",
        "sparsity": 0.0,
    }
    assert CaptureOptions().propagate == "sequential"
    assert (CalibrationOptions().samples, CalibrationOptions().length) == (128, 2048)
    assert CalibrationOptions().split == "train"
    assert EvaluateOptions().datasets[0].split == "test"
    assert (BenchmarkOptions().prompt, BenchmarkOptions().decode) == (4, (256, 512, 1024))


def test_a_task_is_named_once() -> None:
    assert "names boolq more than once" in refused(EvaluateOptions, tasks=("boolq", "rte", "boolq"))["msg"]


@pytest.mark.parametrize("name", ["few_shot", "limit", "task_folder"])
def test_settings_of_tasks_go_with_tasks(name: str) -> None:
    assert (
        f"{name} goes with tasks"
        in refused(EvaluateOptions, **{name: 3 if name != "task_folder" else "a"})["msg"]
    )
    EvaluateOptions(tasks=("boolq",), **{name: 3 if name != "task_folder" else "a"})


def test_an_evaluation_without_tasks_is_written_down_as_before_there_were_tasks() -> None:
    assert set(EvaluateOptions().model_dump()) == {
        "datasets", "window", "max_windows", "batch_size", "dtype", "device",
    }  # fmt: skip


def test_what_is_not_in_use_is_no_part_of_a_prunes_identity() -> None:
    assert PruneOptions(damping=0.1, round=3).identity() == PruneOptions().identity()
    refit, obs = PruneOptions(method="refit"), PruneOptions(method="obs")
    assert PruneOptions(method="refit", round=3).identity() == refit.identity()
    assert PruneOptions(method="refit", damping=0.1).identity() != refit.identity()
    assert PruneOptions(method="obs", round=3).identity() != obs.identity()


def test_an_unknown_method_is_refused_with_those_there_are() -> None:
    assert (
        "unknown pruning method 'magnitude': known are camera, obs, refit"
        in (refused(PruneOptions, method="magnitude")["msg"])
    )


def test_a_field_decides_the_result_unless_it_is_marked() -> None:
    class Section(Options):
        """A section."""

        ratio: float = 0.2
        """Decides."""
        batch_size: Annotated[int, Setting] = 8
        """How the work is done."""
        damping: Annotated[float, UsedWhen(lambda section: section.ratio > 0)] = 0.1
        """Decides where something is removed."""

    assert Section().identity() == {"ratio": 0.2, "damping": 0.1}
    assert Section(ratio=0).identity() == {"ratio": 0}
    assert Section().execution() == {"batch_size": 8}


def test_an_unknown_data_set_is_refused_with_those_there_are() -> None:
    message = refused(DatasetOptions, name="pile")["msg"]
    assert "unknown data set 'pile': known are c4, file, stdlib, wikitext2" in message


def test_a_text_is_the_same_wherever_its_file_lies() -> None:
    here, there = (DatasetOptions(name="file", path=Path(name)) for name in ("here.txt", "there.txt"))
    assert here.identity() == there.identity()
    assert "field" not in DatasetOptions().identity()


def test_a_mask_takes_exactly_the_ratio_unless_it_is_told_to_round() -> None:
    assert PruneOptions(mode="mask").multiple_of == 1
    assert PruneOptions(mode="mask", multiple_of=64).multiple_of == 64
    assert PruneOptions(mode="physical").multiple_of == PruneOptions().multiple_of == 64
