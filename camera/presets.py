"""Settings that belong together, by name: what a recipe or a command takes where nothing else is given."""

from collections.abc import Mapping
from typing import Any, Literal

from camera.options import (
    BenchmarkOptions,
    CalibrationOptions,
    CaptureOptions,
    EvaluateOptions,
    Options,
    PruneOptions,
)

PresetName = Literal["ascend-reference"]

_NINE_TASKS = (
    *("boolq", "openbookqa", "rte", "arc_easy", "winogrande"),
    *("hellaswag", "arc_challenge", "piqa", "mathqa"),
)
_PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # The defaults of its scripts, and of its README where that differs (reduce_ratio); docs/reference.md.
    "ascend-reference": {
        "calibration": {"name": "wikitext2", "samples": 16, "length": 1024, "seed": 1234},
        "capture": {"propagate": "sequential", "dtype": "auto"},
        "prune": {
            "method": "camera",
            "ratio": 0.2,
            "reduce_ratio": 0.95,
            "mode": "physical",  # which rounds to 64 channels, and a mask not at all
        },
        "evaluate": {
            "datasets": [{"name": "wikitext2", "split": "test"}, {"name": "c4", "split": "test"}],
            "window": 2048,
            "dtype": "auto",
            "tasks": list(_NINE_TASKS),
            "task_dtype": "float16",
        },
        "benchmark": {"prompt": 4, "decode": [256, 512, 1024]},
    }
}
_SECTION: dict[type[Options], str] = {
    CalibrationOptions: "calibration",
    CaptureOptions: "capture",
    PruneOptions: "prune",
    EvaluateOptions: "evaluate",
    BenchmarkOptions: "benchmark",
}


def sets(kind: type[Options]) -> bool:
    """Whether presets set fields of such a section."""
    return kind in _SECTION


def fields_of(preset: PresetName | None, kind: type[Options]) -> dict[str, Any]:
    """What a preset sets of one section of a command's options; nothing without a preset.

    What is measured, texts and tasks, a command is told itself.
    """
    if preset is None or kind not in _SECTION:
        return {}
    fields = _PRESETS[preset].get(_SECTION[kind], {})
    return {name: value for name, value in fields.items() if name not in ("datasets", "tasks")}


def below(content: Mapping[str, Any], preset: str) -> dict[str, Any]:
    """A recipe's plain values, on top of a preset's: of each section the preset has, the fields that are not given.

    An unknown preset changes nothing: the recipe's own check refuses it.
    """
    found = dict(content)
    for section, fields in _PRESETS.get(preset, {}).items():
        own = found.get(section, {})
        if isinstance(own, Mapping):
            found[section] = {**fields, **own}
    return found
