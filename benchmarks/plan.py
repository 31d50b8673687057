"""What `camera plan` predicts of a capture, against what is then measured: time and peak memory.

    python benchmarks/plan.py --json plan.json

Prediction and capture run in processes of their own. To reach: both within 25 %.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from common import apart, parser_of, random_tokens, save, show, timed

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.synthetic import write_checkpoint
from camera.devices import peak_memory_bytes
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
    arguments = parser_of(__doc__, samples=16, length=256).parse_args()
    with tempfile.TemporaryDirectory(prefix="camera-benchmark-") as folder:
        rows = [
            measure(Path(folder), shape, dtype, propagate, (arguments.samples, arguments.length))
            for shape in SHAPES
            for dtype in ("float32", "bfloat16")
            for propagate in ("one-shot", "sequential")
        ]
    show(
        "predicted ÷ measured",
        "shape | dtype | propagation | time | memory | measured | within 25 %",
        (
            (
                *(row["shape"], row["dtype"], row["propagate"], f"{row['time']:.2f}", f"{row['memory']:.2f}"),
                f"{row['measured']['seconds']:.1f} s, {bytes_text(row['measured']['peak_bytes'])}",
                "yes" if all(abs(row[what] - 1) <= WITHIN for what in ("time", "memory")) else "no",
            )
            for row in rows
        ),
        left=3,
    )
    save(arguments.json, rows=rows)


def measure(folder: Path, shape: str, dtype: str, propagate: str, windows: tuple[int, int]) -> dict[str, Any]:
    """One row: prediction and capture, of `windows` samples and tokens in each."""
    source = folder / f"{shape}-{dtype}"
    if not source.exists():
        write_checkpoint(source, **SHAPES[shape], dtype=getattr(torch, dtype))
    predicted, measured = (apart(work, source, propagate, *windows) for work in (predict, run))
    return {
        **{"shape": shape, "dtype": dtype, "propagate": propagate},
        **{"predicted": predicted, "measured": measured},
        "time": predicted["seconds"] / measured["seconds"],
        "memory": predicted["peak_bytes"] / measured["peak_bytes"],
    }


def predict(source: Path, propagate: str, samples: int, length: int) -> dict[str, float]:
    """The estimate, as `camera plan` makes it."""
    checkpoint, options, plan = _given(source, propagate)
    estimate = estimate_capture(checkpoint, samples, length, options, plan)
    return {"seconds": estimate.seconds, "peak_bytes": estimate.peak_bytes}


def run(source: Path, propagate: str, samples: int, length: int) -> dict[str, float]:
    """The capture itself."""
    checkpoint, options, plan = _given(source, propagate)
    tokens_ST = random_tokens(1024, samples, length)
    with tempfile.TemporaryDirectory(prefix="camera-benchmark-") as out:
        seconds, _ = timed(lambda: capture(checkpoint, tokens_ST, Path(out), options, plan))
    return {"seconds": seconds, "peak_bytes": peak_memory_bytes(torch.device("cpu"))}


def _given(source: Path, propagate: str) -> tuple[Checkpoint, CaptureOptions, Any]:
    checkpoint = Checkpoint.open(source)
    options = CaptureOptions(propagate=propagate, batch_size=4, device="cpu")  # type: ignore[arg-type]
    return checkpoint, options, plan_prune(checkpoint, options, PruneOptions(ratio=0.2))


if __name__ == "__main__":
    main()
