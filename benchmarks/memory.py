"""Peak memory of prune and save on a checkpoint with openPangu-7B's true shapes (16 GB on disk).

    python benchmarks/memory.py --json memory.json

The work runs in a process of its own, whose peak resident set the kernel counts. To reach: no more than 1.5 times two
decoder layers, the hidden states and the embedding rows in use, and less than 3 GB in all. `--layers` and `--vocab` make
it smaller; a temporary folder of 32 GB is needed otherwise and removed at the end.
"""

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import apart, parser_of, random_tokens, save, show, timed
from synthetic import write_checkpoint

from camera.checkpoints.checkpoint import Checkpoint
from camera.devices import peak_memory_bytes
from camera.options import CaptureOptions, PruneOptions
from camera.pruning.prune_checkpoint import prune_checkpoint
from camera.units import bytes_text, seconds_text

TO_REACH = 1.5
LIMIT_BYTES = 3e9


def main() -> None:
    """Measure, print a table, and write JSON if asked."""
    shape = {"layers": 34, "hidden": 4096, "ffn": 12800, "vocab": 153376}
    parser = parser_of(__doc__, **shape, samples=2, length=128, propagate=["sequential", "one-shot"])
    parser.add_argument("--folder", type=Path, help="where to put the temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="camera-benchmark-", dir=arguments.folder) as folder:
        source = write_checkpoint(
            Path(folder) / "model",
            **{name: getattr(arguments, name) for name in shape},
            heads=arguments.hidden // 128,
            kv_heads=max(1, arguments.hidden // 512),
            positions=32768,
            dtype=torch.bfloat16,
        )
        rows = [measure(source, propagate, arguments) for propagate in arguments.propagate]
    show(
        "prune and save, bf16",
        "propagation | checkpoint | time | peak memory | of which Python and torch | floor | ratio | to reach | met",
        (
            (
                *(row["propagate"], bytes_text(row["checkpoint_bytes"]), seconds_text(row["seconds"])),
                *(bytes_text(row[name]) for name in ("peak_bytes", "idle_bytes", "floor_bytes")),
                *(f"{row['ratio']:.2f}", f"≤ {TO_REACH} and < {bytes_text(LIMIT_BYTES)}"),
                "yes" if row["ratio"] <= TO_REACH and row["peak_bytes"] < LIMIT_BYTES else "no",
            )
            for row in rows
        ),
    )
    save(arguments.json, rows=rows)


def measure(source: Path, propagate: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Prune in a fresh process and ask the kernel for its peak."""
    found = apart(work, source, propagate, arguments.samples, arguments.length, arguments.vocab)
    checkpoint = Checkpoint.open(source)
    layer = sum(checkpoint.tensors[name].size_bytes for name in checkpoint.layer_tensors(0))
    tokens = arguments.samples * arguments.length
    hidden_and_rows = 2 * tokens * checkpoint.hidden_size * checkpoint.dtype.itemsize
    floor = 2 * layer + hidden_and_rows
    size = sum(info.size_bytes for info in checkpoint.tensors.values())
    common = {"propagate": propagate, "checkpoint_bytes": size, "floor_bytes": floor}
    return {**common, "ratio": found["peak_bytes"] / floor, **found}


def work(source: Path, propagate: str, samples: int, length: int, vocab: int) -> dict[str, float]:
    """What is measured: one call, as `camera prune` makes it."""
    checkpoint, device = Checkpoint.open(source), torch.device("cpu")
    checkpoint.check_shapes()
    idle = peak_memory_bytes(device)
    tokens_ST, out = random_tokens(vocab, samples, length), source.with_name(f"pruned-{propagate}")
    capture = CaptureOptions(propagate=propagate, batch_size=2, device="cpu")  # type: ignore[arg-type]
    seconds, _ = timed(lambda: prune_checkpoint(checkpoint, tokens_ST, out, capture, PruneOptions(ratio=0.2)))
    peak = peak_memory_bytes(device)
    shutil.rmtree(out)
    return {"seconds": seconds, "peak_bytes": peak, "idle_bytes": idle}


if __name__ == "__main__":
    main()
