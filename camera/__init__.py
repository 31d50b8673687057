"""Compress large language models: importance, pruning, 4-bit formats, measurement.

This package is the mathematics, the formats and the devices. It knows no orchestrator: it never imports
prefect, mlflow or dvc, nor the packages ``tasks`` and ``flows`` that are built on it.

Its functions for a model's stages (`camera.api`) and their options are imported as they are first asked for:
docs/library.md shows them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from camera.api import (
        Evaluation,
        bench,
        capture,
        convert,
        evaluate,
        imatrix,
        import_gguf,
        open_checkpoint,
        prune,
        quantize,
        save,
        score,
    )
    from camera.errors import CameraError
    from camera.options import (
        BenchmarkOptions,
        CalibrationOptions,
        CaptureOptions,
        DatasetOptions,
        EvaluateOptions,
        PruneOptions,
        QuantizeOptions,
    )

__version__ = "0.1.0"
__all__ = [
    "BenchmarkOptions",
    "CalibrationOptions",
    "CameraError",
    "CaptureOptions",
    "DatasetOptions",
    "EvaluateOptions",
    "Evaluation",
    "PruneOptions",
    "QuantizeOptions",
    "bench",
    "capture",
    "convert",
    "evaluate",
    "imatrix",
    "import_gguf",
    "open_checkpoint",
    "prune",
    "quantize",
    "save",
    "score",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'camera' has no attribute {name!r}")
    home = "errors" if name == "CameraError" else "options" if name.endswith("Options") else "api"
    return getattr(import_module(f"camera.{home}"), name)
