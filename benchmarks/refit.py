"""The price of refit and OBS: one walk that prunes, against a plain walk that only captures statistics.

    python benchmarks/refit.py --json refit.json

The layer has the proportions of openPangu-7B (hidden : FFN : calibration tokens = 4096 : 12,800 : 262,144) at an eighth of
its size, so that the Gram matrix and its factors have their true share: both grow with the cube of the size, as the
layer's own work does. CPU seconds are counted, of this process alone, because they hold still on a busy machine. To reach:
2 times plain capture.
"""

import argparse
import shutil
import tempfile
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from synthetic import write_checkpoint

from camera.benchmark.report import Spread
from camera.checkpoints.checkpoint import Checkpoint
from camera.devices import describe_device
from camera.files import write_json
from camera.options import CaptureOptions, PruneOptions
from camera.pruning.prune_checkpoint import prune_checkpoint
from camera.pruning.stages import capture

SHAPE: dict[str, Any] = {
    "layers": 2,
    "hidden": 512,
    "ffn": 1600,
    "vocab": 1024,
    "heads": 8,
    "kv_heads": 2,
    "positions": 2048,
}
METHODS: dict[str, dict[str, Any]] = {
    "camera": {},
    "refit": {"method": "refit"},
    "obs": {"method": "obs"},
}
TO_REACH = 2.0


def main() -> None:
    """Measure, print a table, and write JSON if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3, help="turns (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=64, help="calibration samples (default: %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens in a sample (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="of the checkpoint (default: %(default)s)")
    parser.add_argument("--propagate", default="one-shot", choices=["one-shot", "sequential"])
    parser.add_argument("--json", type=Path, help="write all numbers here")
    arguments = parser.parse_args()
    rows = measure(arguments)
    table = Table(title=f"{SHAPE}, {arguments.samples} × {arguments.length} tokens", title_justify="left")
    for column in ("method", "CPU s", "s", "over plain capture", "spread", "to reach", "met"):
        table.add_column(column)
    for row in rows:
        ratio = row["ratio"]
        table.add_row(
            row["method"],
            f"{row['cpu_s']['median']:.2f}",
            f"{row['wall_s']['median']:.2f}",
            f"{ratio['median']:.2f}",
            f"{ratio['low']:.2f} to {ratio['high']:.2f}",
            f"≤ {TO_REACH:.2f}",
            "yes" if ratio["median"] <= TO_REACH else "no",
        )
    Console().print(table)
    if arguments.json:
        device = describe_device(torch.device("cpu"))
        write_json(arguments.json, {"device": device, "shape": SHAPE, "rows": rows})


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every method in turns with plain capture."""
    tokens_ST = torch.randint(
        SHAPE["vocab"], (arguments.samples, arguments.length), generator=torch.Generator().manual_seed(0)
    )
    how = CaptureOptions(propagate=arguments.propagate, device="cpu")
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ("capture", *METHODS)}
    with tempfile.TemporaryDirectory(prefix="camera-benchmark-") as scratch:
        folder = Path(scratch)
        dtype = getattr(torch, arguments.dtype)
        checkpoint = Checkpoint.open(write_checkpoint(folder / "model", **SHAPE, dtype=dtype))
        for turn in range(arguments.repeats + 1):
            seen_ST = tokens_ST if turn else tokens_ST[:2]  # the first turn warms up imports and kernels
            for name, kept in times.items():
                out = folder / "out"
                started = process_time(), perf_counter()
                if name == "capture":
                    out.mkdir()
                    capture(checkpoint, seen_ST, out, CaptureOptions(propagate="one-shot", device="cpu"))
                else:
                    prune_checkpoint(checkpoint, seen_ST, out, how, PruneOptions(ratio=0.2, **METHODS[name]))
                if turn:
                    kept.append((process_time() - started[0], perf_counter() - started[1]))
                shutil.rmtree(out)
    plain = [cpu for cpu, _ in times["capture"]]
    return [
        {
            "method": name,
            "propagate": arguments.propagate,
            "cpu_s": Spread.of([cpu for cpu, _ in measured]).model_dump(),
            "wall_s": Spread.of([wall for _, wall in measured]).model_dump(),
            "ratio": Spread.of(
                [cpu / base for (cpu, _), base in zip(measured, plain, strict=True)]
            ).model_dump(),
        }
        for name, measured in times.items()
    ]


if __name__ == "__main__":
    main()
