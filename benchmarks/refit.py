"""The price of refit and OBS: one run that prunes, against a run that only captures statistics.

    python benchmarks/refit.py --json refit.json

The layer has the proportions of openPangu-7B (hidden : FFN : calibration tokens = 4096 : 12,800 : 262,144) at an eighth of
its size, so that the Gram matrix and its factors have their true share: both grow with the cube of the size, as the
layer's own work does. CPU seconds are counted, of this process alone, because they hold still on a busy machine. To reach:
2 times plain capture.
"""

import argparse
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Seconds, clock, cpu, in_turns, parser_of, random_tokens, ratio, save, show, span, timed

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.synthetic import write_checkpoint
from camera.options import CaptureOptions, PruneOptions
from camera.pruning.prune_checkpoint import prune_checkpoint
from camera.pruning.stages import capture

SHAPE: dict[str, Any] = {"layers": 2, "hidden": 512, "ffn": 1600, "vocab": 1024, "heads": 8, "kv_heads": 2}
METHODS = ("camera", "refit", "obs")
TO_REACH = 2.0


def main() -> None:
    """Measure, print a table, and write JSON if asked."""
    parser = parser_of(__doc__, repeats=3, samples=64, length=512, dtype="float32")
    parser.add_argument("--propagate", default="one-shot", choices=["one-shot", "sequential"])
    arguments = parser.parse_args()
    rows = measure(arguments)
    show(
        f"{SHAPE}, {arguments.samples} × {arguments.length} tokens",
        "method | CPU s | s | over plain capture | spread | to reach | met",
        (
            (
                *(row["method"], f"{row['cpu_s'].median:.2f}", f"{row['wall_s'].median:.2f}"),
                *(f"{row['ratio'].median:.2f}", span(row["ratio"]), f"≤ {TO_REACH:.2f}"),
                "yes" if row["ratio"].median <= TO_REACH else "no",
            )
            for row in rows
        ),
    )
    save(arguments.json, shape=SHAPE, rows=rows)


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every method in turns with plain capture."""
    tokens_ST = random_tokens(SHAPE["vocab"], arguments.samples, arguments.length)
    how = CaptureOptions(propagate=arguments.propagate, device="cpu")
    with tempfile.TemporaryDirectory(prefix="camera-benchmark-") as scratch:
        folder = Path(scratch)
        source = write_checkpoint(folder / "model", **SHAPE, dtype=getattr(torch, arguments.dtype))
        checkpoint, out = Checkpoint.open(source), folder / "out"

        def plain() -> Seconds:
            out.mkdir()
            options = CaptureOptions(propagate="one-shot", device="cpu")
            seconds = timed(lambda: capture(checkpoint, tokens_ST, out, options))
            shutil.rmtree(out)
            return seconds

        def prune(method: str) -> Seconds:
            options = PruneOptions(ratio=0.2, method=method)
            seconds = timed(lambda: prune_checkpoint(checkpoint, tokens_ST, out, how, options))
            shutil.rmtree(out)
            return seconds

        works = {"capture": plain} | {method: partial(prune, method) for method in METHODS}
        times = in_turns(works, arguments.repeats)
    base = cpu(times["capture"]).samples
    return [
        {
            **{"method": name, "propagate": arguments.propagate, "cpu_s": cpu(measured)},
            **{"wall_s": clock(measured), "ratio": ratio(cpu(measured).samples, base)},
        }
        for name, measured in times.items()
    ]


if __name__ == "__main__":
    main()
