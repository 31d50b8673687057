"""What `camera plan` predicts of a capture, against what is then measured: time and peak memory.

    python benchmarks/plan.py --json plan.json

Prediction and capture run in processes of their own. To reach: both within 25 %.
"""

import argparse
import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from synthetic import write_checkpoint

from camera.checkpoints.checkpoint import Checkpoint
from camera.devices import peak_memory_bytes
from camera.files import write_json
from camera.options import CaptureOptions, PruneOptions
from camera.pruning.estimate import estimate_capture
from camera.pruning.plan import plan_prune
from camera.pruning.stages import capture
from camera.units import bytes_text

WITHIN = 0.25
SHAPES: dict[str, dict[str, Any]] = {
    "8 × 1024": {"layers": 8, "hidden": 1024, "ffn": 3200, "vocab": 1024, "heads": 16, "kv_heads": 4},
    "4 × 2048": {"layers": 4, "hidden": 2048, "ffn": 6400, "vocab": 1024, "heads": 16, "kv_heads": 4},
}


def main() -> None:
    """Measure, print a table, and write JSON if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument("--length", type=int, default=256, help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="camera-benchmark-") as folder:
        for name, shape in SHAPES.items():
            for dtype in ("float32", "bfloat16"):
                source = Path(folder) / f"{name}-{dtype}"
                write_checkpoint(source, **shape, positions=2048, dtype=getattr(torch, dtype))
                for propagate in ("one-shot", "sequential"):
                    given = (source, propagate, arguments.samples, arguments.length)
                    predicted, measured = apart(predict, *given), apart(run, *given)
                    rows.append(
                        {
                            "shape": name, "dtype": dtype, "propagate": propagate,
                            "predicted": predicted, "measured": measured,
                            "time": predicted["seconds"] / measured["seconds"],
                            "memory": predicted["peak_bytes"] / measured["peak_bytes"],
                        }
                    )  # fmt: skip
    table = Table(title="predicted ÷ measured", title_justify="left")
    for column in ("shape", "dtype", "propagation", "time", "memory", "measured", "within 25 %"):
        table.add_column(column)
    for row in rows:
        good = all(abs(row[what] - 1) <= WITHIN for what in ("time", "memory"))
        measured = f"{row['measured']['seconds']:.1f} s, {bytes_text(row['measured']['peak_bytes'])}"
        table.add_row(
            row["shape"], row["dtype"], row["propagate"],
            f"{row['time']:.2f}", f"{row['memory']:.2f}", measured, "yes" if good else "no",
        )  # fmt: skip
    Console().print(table)
    if arguments.json:
        write_json(arguments.json, {"rows": rows})


def apart(work: Callable[..., None], *given: Any) -> dict[str, float]:
    """Do something in a fresh process."""
    context = multiprocessing.get_context("spawn")
    results: Any = context.SimpleQueue()
    process = context.Process(target=work, args=(*given, results))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"the measured process ended with {process.exitcode}")
    found: dict[str, float] = results.get()
    return found


def predict(source: Path, propagate: str, samples: int, length: int, results: Any) -> None:
    """The estimate, as `camera plan` makes it."""
    checkpoint, options, selection = _given(source, propagate)
    estimate = estimate_capture(checkpoint, samples, length, options, selection)
    results.put({"seconds": estimate.seconds, "peak_bytes": estimate.peak_bytes})


def run(source: Path, propagate: str, samples: int, length: int, results: Any) -> None:
    """The capture itself."""
    checkpoint, options, selection = _given(source, propagate)
    tokens = torch.randint(1024, (samples, length), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory(prefix="camera-benchmark-") as out:
        started = perf_counter()
        capture(checkpoint, tokens, Path(out), options, selection)
        seconds = perf_counter() - started
    results.put({"seconds": seconds, "peak_bytes": peak_memory_bytes(torch.device("cpu"))})


def _given(source: Path, propagate: str) -> tuple[Checkpoint, CaptureOptions, Any]:
    checkpoint = Checkpoint.open(source)
    options = CaptureOptions(propagate=propagate, batch_size=4, device="cpu")  # type: ignore[arg-type]
    return checkpoint, options, plan_prune(checkpoint, options, PruneOptions(ratio=0.2))


if __name__ == "__main__":
    main()
