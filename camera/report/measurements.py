"""What the evaluations of a run measured, read from the folders of their stages."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from camera.errors import CameraError
from camera.evaluation.tasks import TaskResult, read_task_result
from camera.files import read_json
from camera.report.schema import MODEL_IDS, ModelId, Perplexity


def perplexities(folders: Mapping[str, Path]) -> dict[ModelId, dict[str, dict[str, Any]]]:
    """What `perplexity.json` holds, by model and text, in the order in which the folders are given."""
    found: dict[ModelId, dict[str, dict[str, Any]]] = defaultdict(dict)
    for model, text, folder in _measurements(folders, "evaluate"):
        found[model][text] = read_json(folder / "perplexity.json")
    return dict(found)


def task_results(folders: Mapping[str, Path]) -> dict[ModelId, dict[str, TaskResult]]:
    """What `task.json` holds, by model and task, in the order in which the folders are given."""
    found: dict[ModelId, dict[str, TaskResult]] = defaultdict(dict)
    for model, task, folder in _measurements(folders, "task"):
        found[model][task] = read_task_result(folder / "task.json")
    return dict(found)


def _measurements(folders: Mapping[str, Path], wanted: str) -> Iterator[tuple[ModelId, str, Path]]:
    """The folders of one kind of measurement: `<kind>/<model>/<text or task>`."""
    for key, folder in folders.items():
        part, _, rest = key.partition("/")
        if part != wanted:
            continue
        label, _, of = rest.partition("/")
        model = next((known for known in MODEL_IDS if known == label), None)
        if model is None or not of:
            raise CameraError(f"report: {key!r} names no model of {', '.join(MODEL_IDS)}, or no text or task")
        yield model, of, folder


def score_text(found: dict[str, Any], original: dict[str, Any] | None) -> Perplexity:
    """Perplexity on one text, with its change against the original's."""
    # Texts cut in other windows are other measurements, and their ratio would mean nothing.
    comparable = original is not None and all(found[key] == original[key] for key in ("tokens", "window"))
    return Perplexity(
        value=found["perplexity"],
        change=found["perplexity"] / original["perplexity"] - 1 if original and comparable else None,
        tokens=found["tokens"],
        window=found["window"],
        dtype=found["dtype"],
    )
