"""Presets are what they are named after."""

from camera import presets
from camera.evaluation.lm_eval_tasks import NINE_TASKS
from camera.options import DatasetOptions, EvaluateOptions


def test_the_ascend_reference_measures_the_nine_tasks() -> None:
    assert tuple(presets.below({}, "ascend-reference")["evaluate"]["tasks"]) == NINE_TASKS


def test_a_command_is_told_itself_what_to_measure() -> None:
    how = EvaluateOptions(**presets.fields_of("ascend-reference", EvaluateOptions))
    assert (how.tasks, how.window, how.task_dtype) == ((), 2048, "float16")


def test_a_section_that_no_preset_names_stays_as_it_is() -> None:
    assert presets.fields_of("ascend-reference", DatasetOptions) == {}
    assert not presets.sets(DatasetOptions)


def test_sections_that_are_not_given_are_added_and_given_fields_stay() -> None:
    made = presets.below({"name": "x", "prune": {"ratio": 0.5}}, "ascend-reference")
    assert made["prune"]["ratio"] == 0.5
    assert made["prune"]["reduce_ratio"] == 0.95
    assert made["calibration"]["seed"] == 1234
