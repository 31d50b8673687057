"""A whole recipe on a real model, and what it found beside what was published of the Ascend version of CAMERA.

The store lies in the folder of the check, so that a run that was ended goes on where it was.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import camera
from camera.device_check.context import Context
from camera.device_check.schema import Measurement
from camera.errors import CameraError

_STORE = "store"
_RECIPES = Path(camera.__file__).parents[1] / "recipes"
_PUBLISHED = {
    "milliseconds": {"baseline": 48.6, "pruned+quantized": 14.6},
    "wikitext2": {"original": 34.94, "pruned+quantized": 44.35},
    "c4": {"original": 43.73, "pruned+quantized": 48.67},
    "nine tasks": {"original": 52.89, "pruned+quantized": 51.00},
}
"""docs/reference.md: ms a token by llama.cpp, perplexity, mean accuracy in per cent; of the dense and the pruned model."""


def run(context: Context, recipe: str) -> None:
    """Run it.

    Args:
        context: of the step.
        recipe: its file in `recipes/`.

    Raises:
        CameraError: if the recipe cannot be run, or is not here.
    """
    path = _RECIPES / recipe
    if not path.is_file():
        raise CameraError(f"recipes/{recipe} is in a checkout of the repository only: run the check from one")
    assert context.options.model is not None
    store = context.findings.parents[1] / _STORE
    store.mkdir(exist_ok=True)
    device, settings = context.options.device, {"model": str(context.options.model.resolve())}
    settings |= {f"{section}.device": device for section in ("capture", "quantize", "evaluate", "benchmark")}
    for name in ("llama_cpp", "llama_cpp_stock"):
        if (build := getattr(context.options, name)) is not None:
            settings[f"benchmark.{name}"] = str(build.resolve())
    command = [sys.executable, "-m", "camera", "run", str(path), "--no-prefect", "--json"]
    for name, value in settings.items():
        command += ["--set", f"{name}={value}"]
    done = subprocess.run(command, cwd=store, stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 3):  # 3: complete, and below its quality gate
        raise CameraError(f"camera run ended with exit code {done.returncode}: see the log")
    _tell(context, json.loads(done.stdout)["results"])


def _tell(context: Context, results: dict[str, Any]) -> None:
    """Perplexity, accuracy and speed of every model."""
    ids = {row["title"]: row["id"] for row in results["models"]}
    for row in results["models"]:
        of = {"model": row["title"]}
        for text, score in row["perplexity"].items():
            beside = next(
                (
                    found[row["id"]]
                    for name, found in _PUBLISHED.items()
                    if name in text and row["id"] in found
                ),
                None,
            )
            context.add(
                Measurement(what="perplexity", of={**of, "text": text}, value=score["value"], beside=beside)
            )
        if accuracy := row.get("task_average", {}).get("acc"):
            beside = _PUBLISHED["nine tasks"].get(row["id"])
            value = 100 * accuracy["value"]
            context.add(Measurement(what="mean accuracy", of=of, value=value, unit="%", beside=beside))
    rows = results["benchmark"]
    if not any(timed["decode_ms"] is not None for timed in rows):
        error = "; ".join(sorted({str(timed["failure"]) for timed in rows})) or "the recipe timed nothing"
        context.add(Measurement(what="rows that were timed", value=0, at_least=1, error=error))
    for timed in rows:
        of = {"model": timed["model"], "engine": timed["engine"], "decode": timed["decode"]}
        if timed["decode_ms"] is None:
            context.add(Measurement(what="time of a token", of=of, error=timed["failure"], optional=True))
            continue
        published = _PUBLISHED["milliseconds"].get(ids.get(timed["model"], ""))
        beside = published if timed["engine"] == "llama.cpp" else None
        value = timed["decode_ms"]["median"]
        context.add(Measurement(what="time of a token", of=of, value=value, unit="ms", beside=beside))
