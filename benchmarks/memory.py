"""Peak memory of pruning a checkpoint with openPangu-7B's true shapes (16 GB on disk), however it is split into files.

    python benchmarks/memory.py --json memory.json
    python benchmarks/memory.py --layers 2 --shards 5GB apart

`prune` makes the whole way in one run, `save` is the last of the four stages, which compares what it wrote. `apart` is a shard
for each layer, for what is before them and for what is behind. The work runs in a process of its own, whose peak resident set
the kernel counts. To reach: no more than 1.5 times two decoder layers, the hidden states and the embedding rows in use, and
1.3 GB in all. `--layers` and `--vocab` make it smaller; a temporary folder of 32 GB is needed otherwise and removed at the end.
"""

import argparse
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import apart, parser_of, random_tokens, save, show, timed

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.synthetic import write_checkpoint
from camera.devices import peak_memory_bytes
from camera.options import CaptureOptions, PruneOptions
from camera.pruning import stages
from camera.pruning.plan import plan_prune
from camera.pruning.prune_checkpoint import prune_checkpoint
from camera.units import bytes_text, seconds_text

TO_REACH = 1.5
LIMIT_BYTES = 1.3e9
SHARDS = {"5GB": 5 << 30, "apart": None}


def main() -> None:
    """Measure, print a table, and write JSON if asked."""
    shape = {"layers": 34, "hidden": 4096, "ffn": 12800, "vocab": 153376}
    runs = {"propagate": ["sequential", "one-shot"], "what": ["prune", "save"], "shards": ["5GB"]}
    parser = parser_of(__doc__, **shape, samples=2, length=128, **runs)
    parser.add_argument("--folder", type=Path, help="where to put the temporary folder")
    arguments = parser.parse_args()
    rows = []
    for shards in arguments.shards:
        with tempfile.TemporaryDirectory(prefix="camera-benchmark-", dir=arguments.folder) as folder:
            source = write_checkpoint(
                Path(folder) / "model",
                **{name: getattr(arguments, name) for name in shape},
                heads=arguments.hidden // 128,
                kv_heads=max(1, arguments.hidden // 512),
                positions=32768,
                dtype=torch.bfloat16,
                shard_bytes=SHARDS[shards],
            )
            if "prune" in arguments.what:
                rows += [measure(source, shards, way, arguments) for way in arguments.propagate]
            if "save" in arguments.what:
                rows.append(measure(source, shards, "save", arguments))
    show(
        "prune, and save alone, bf16",
        "what | shards | checkpoint | time | peak memory | of which Python and torch | floor | ratio | to reach | met",
        (
            (
                *(
                    row["what"],
                    row["shards"],
                    bytes_text(row["checkpoint_bytes"]),
                    seconds_text(row["seconds"]),
                ),
                *(bytes_text(row[name]) for name in ("peak_bytes", "idle_bytes", "floor_bytes")),
                *(f"{row['ratio']:.2f}", f"≤ {TO_REACH} and ≤ {bytes_text(LIMIT_BYTES)}"),
                "yes" if row["ratio"] <= TO_REACH and row["peak_bytes"] <= LIMIT_BYTES else "no",
            )
            for row in rows
        ),
        left=2,
    )
    save(arguments.json, rows=rows)


def measure(source: Path, shards: str, what: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Prune in a fresh process, or save in one what another has chosen, and ask the kernel for its peak."""
    given = source, arguments.samples, arguments.length, arguments.vocab
    if what == "save":
        apart(choose, *given)
        found = apart(save_chosen, source)
    else:
        found = apart(prune, *given, what)
    checkpoint = Checkpoint.open(source)
    layer = sum(checkpoint.tensors[name].size_bytes for name in checkpoint.layer_tensors(0))
    tokens = arguments.samples * arguments.length
    hidden_and_rows = 2 * tokens * checkpoint.hidden_size * checkpoint.dtype.itemsize
    floor = 2 * layer + hidden_and_rows
    size = sum(info.size_bytes for info in checkpoint.tensors.values())
    common = {"what": what, "shards": shards, "checkpoint_bytes": size, "floor_bytes": floor}
    return {**common, "ratio": found["peak_bytes"] / floor, **found}


def prune(source: Path, samples: int, length: int, vocab: int, propagate: str) -> dict[str, float]:
    """One call, as `camera prune` makes it."""
    checkpoint, out = Checkpoint.open(source), source.with_name(f"pruned-{propagate}")
    checkpoint.check_shapes()
    tokens_ST = random_tokens(vocab, samples, length)
    capture = CaptureOptions(propagate=propagate, batch_size=2, device="cpu")  # type: ignore[arg-type]
    return measured(
        lambda: prune_checkpoint(checkpoint, tokens_ST, out, capture, PruneOptions(ratio=0.2)), out
    )


def choose(source: Path, samples: int, length: int, vocab: int) -> None:
    """Capture, score and prune, each into its folder."""
    checkpoint, options = Checkpoint.open(source), PruneOptions(ratio=0.2)
    captured, scored, pruned = (source.with_name(name) for name in ("captured", "scored", "pruned"))
    for folder in (captured, scored, pruned):
        folder.mkdir()
    capture = CaptureOptions(propagate="one-shot", batch_size=2, device="cpu")
    stages.capture(checkpoint, random_tokens(vocab, samples, length), captured, capture)
    stages.score(checkpoint, captured, scored, options.reduce_ratio)
    stages.prune(checkpoint, scored, pruned, plan_prune(checkpoint, capture, options), options)


def save_chosen(source: Path) -> dict[str, float]:
    """The stage `save`."""
    checkpoint, out = Checkpoint.open(source), source.with_name("saved")
    checkpoint.check_shapes()
    out.mkdir()
    return measured(lambda: stages.save(checkpoint, source.with_name("pruned"), out), out)


def measured(work: Callable[[], None], out: Path) -> dict[str, float]:
    """What a call takes that writes `out`, which goes."""
    cpu = torch.device("cpu")
    idle = peak_memory_bytes(cpu)
    seconds, _ = timed(work)
    peak = peak_memory_bytes(cpu)
    shutil.rmtree(out)
    return {"seconds": seconds, "peak_bytes": peak, "idle_bytes": idle}


if __name__ == "__main__":
    main()
