"""Peak memory of prune and save on a checkpoint with openPangu-7B's true shapes (16 GB on disk).

    python benchmarks/memory.py --json memory.json

The work runs in a process of its own, whose peak resident set the kernel counts. To reach: no more than 1.5 times two
decoder layers, the hidden states and the embedding rows in use, and less than 3 GB in all. `--layers` and `--vocab` make
it smaller; a temporary folder of 32 GB is needed otherwise and removed at the end.
"""

import argparse
import multiprocessing
import tempfile
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
from camera.pruning.prune_checkpoint import prune_checkpoint
from camera.units import bytes_text, seconds_text

TO_REACH = 1.5
LIMIT_BYTES = 3e9


def main() -> None:
    """Measure, print a table, and write JSON if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=34, help="(default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=4096, help="(default: %(default)s)")
    parser.add_argument("--ffn", type=int, default=12800, help="(default: %(default)s)")
    parser.add_argument("--vocab", type=int, default=153376, help="(default: %(default)s)")
    parser.add_argument("--samples", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--length", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--propagate", nargs="+", default=["sequential", "one-shot"])
    parser.add_argument("--folder", type=Path, help="where to put the temporary folder")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="camera-benchmark-", dir=arguments.folder) as folder:
        source = write_checkpoint(
            Path(folder) / "model",
            layers=arguments.layers,
            hidden=arguments.hidden,
            ffn=arguments.ffn,
            vocab=arguments.vocab,
            heads=arguments.hidden // 128,
            kv_heads=max(1, arguments.hidden // 512),
            positions=32768,
            dtype=torch.bfloat16,
        )
        for propagate in arguments.propagate:
            rows.append(measure(source, propagate, arguments))
    table = Table(title="prune and save, bf16", title_justify="left")
    for column in (
        "propagation",
        "checkpoint",
        "time",
        "peak memory",
        "of which Python and torch",
        "floor",
        "ratio",
        "to reach",
        "met",
    ):
        table.add_column(column)
    for row in rows:
        table.add_row(
            row["propagate"],
            bytes_text(row["checkpoint_bytes"]),
            seconds_text(row["seconds"]),
            bytes_text(row["peak_bytes"]),
            bytes_text(row["idle_bytes"]),
            bytes_text(row["floor_bytes"]),
            f"{row['ratio']:.2f}",
            f"≤ {TO_REACH} and < {bytes_text(LIMIT_BYTES)}",
            "yes" if row["ratio"] <= TO_REACH and row["peak_bytes"] < LIMIT_BYTES else "no",
        )
    Console().print(table)
    if arguments.json:
        write_json(arguments.json, {"rows": rows})


def measure(source: Path, propagate: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Prune in a fresh process and ask the kernel for its peak."""
    context = multiprocessing.get_context("spawn")
    results: Any = context.SimpleQueue()
    process = context.Process(
        target=work, args=(source, propagate, arguments.samples, arguments.length, arguments.vocab, results)
    )
    process.start()
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"the measured process ended with {process.exitcode}")
    found: dict[str, Any] = results.get()
    checkpoint = Checkpoint.open(source)
    layer = sum(checkpoint.tensors[name].size_bytes for name in checkpoint.layer_tensors(0))
    tokens = arguments.samples * arguments.length
    hidden_and_rows = 2 * tokens * checkpoint.hidden_size * checkpoint.dtype.itemsize
    floor = 2 * layer + hidden_and_rows
    return {
        "propagate": propagate,
        "checkpoint_bytes": sum(info.size_bytes for info in checkpoint.tensors.values()),
        "floor_bytes": floor,
        "ratio": found["peak_bytes"] / floor,
        **found,
    }


def work(source: Path, propagate: str, samples: int, length: int, vocab: int, results: Any) -> None:
    """What is measured: one call, as `camera prune` makes it."""
    checkpoint = Checkpoint.open(source)
    checkpoint.check_shapes()
    idle = peak_memory_bytes(torch.device("cpu"))
    tokens = torch.randint(vocab, (samples, length), generator=torch.Generator().manual_seed(0))
    out = source.with_name(f"pruned-{propagate}")
    started = perf_counter()
    prune_checkpoint(
        checkpoint,
        tokens,
        out,
        CaptureOptions(propagate=propagate, batch_size=2, device="cpu"),  # type: ignore[arg-type]
        PruneOptions(ratio=0.2),
    )
    seconds = perf_counter() - started
    peak = peak_memory_bytes(torch.device("cpu"))
    for path in out.iterdir():
        path.unlink()
    out.rmdir()
    results.put({"seconds": seconds, "peak_bytes": peak, "idle_bytes": idle})


if __name__ == "__main__":
    main()
