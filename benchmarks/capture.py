"""The price of pruning: capture, score, prune and save in one walk, against one plain forward pass.

    python benchmarks/capture.py --json capture.json

The plain pass runs the same tokens through the same decoder layers, already in memory, in the same batches. The walk
reads the layers from disk, gathers statistics, selects, and writes the pruned checkpoint. They run in turns, the order
reversed every other turn. To reach: 1.10 times a plain pass one-shot, 1.15 times sequential. The floor is the plain
pass itself: its FLOPs over the rate of a matrix product measured just before.
"""

import argparse
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
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

SHAPE: dict[str, Any] = {
    "layers": 8,
    "hidden": 1024,
    "ffn": 3200,
    "vocab": 1024,
    "heads": 16,
    "kv_heads": 4,
    "positions": 2048,
}
TO_REACH = {"one-shot": 1.10, "sequential": 1.15}


def main() -> None:
    """Measure, print a table, and write JSON if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5, help="turns (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=16, help="calibration samples (default: %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens in a sample (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=4, help="samples at once (default: %(default)s)")
    parser.add_argument(
        "--dtype", nargs="+", default=["float32", "bfloat16"], help="dtypes of the checkpoint"
    )
    parser.add_argument("--json", type=Path, help="write all numbers here")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="camera-benchmark-") as folder:
        for name in arguments.dtype:
            rows += measure(Path(folder), name, arguments)
    table = Table(title=f"{SHAPE}, {arguments.samples} × {arguments.length} tokens", title_justify="left")
    for column in (
        "dtype",
        "propagation",
        "plain pass s",
        "walk s",
        "ratio",
        "spread",
        "to reach",
        "met",
        "plain pass / floor",
    ):
        table.add_column(column)
    for row in rows:
        ratio = row["ratio"]
        table.add_row(
            row["dtype"],
            row["propagate"],
            f"{row['plain_s']['median']:.2f}",
            f"{row['walk_s']['median']:.2f}",
            f"{ratio['median']:.3f}",
            f"{ratio['low']:.3f} to {ratio['high']:.3f}",
            f"≤ {row['to_reach']:.2f}",
            "yes" if ratio["median"] <= row["to_reach"] else "no",
            f"{row['over_floor']:.2f}",
        )
    Console().print(table)
    if arguments.json:
        write_json(
            arguments.json, {"device": describe_device(torch.device("cpu")), "shape": SHAPE, "rows": rows}
        )


def measure(folder: Path, dtype: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Both propagations of one dtype, each in turns with the plain pass."""
    source = write_checkpoint(folder / dtype, **SHAPE, dtype=getattr(torch, dtype))
    checkpoint = Checkpoint.open(source)
    tokens = torch.randint(
        SHAPE["vocab"], (arguments.samples, arguments.length), generator=torch.Generator().manual_seed(0)
    )
    plain = plain_pass(checkpoint, tokens, arguments.batch_size)
    floor = flops(tokens.numel(), arguments.length) / matmul_rate(getattr(torch, dtype))
    rows = []
    for propagate, to_reach in TO_REACH.items():
        capture = CaptureOptions(propagate=propagate, batch_size=arguments.batch_size, device="cpu")  # type: ignore[arg-type]
        out = folder / f"{dtype}-{propagate}"

        def walk(capture: CaptureOptions = capture, out: Path = out) -> None:
            prune_checkpoint(checkpoint, tokens, out, capture, PruneOptions(ratio=0.2))

        def clear(out: Path = out) -> None:
            shutil.rmtree(out, ignore_errors=True)

        plain()
        walk()  # warm caches and kernels
        times = in_turns((plain, walk), arguments.repeats, before=clear)
        rows.append(
            {
                "dtype": dtype,
                "propagate": propagate,
                "plain_s": Spread.of(times[0]).model_dump(),
                "walk_s": Spread.of(times[1]).model_dump(),
                "ratio": Spread.of([b / a for a, b in zip(*times, strict=True)]).model_dump(),
                "to_reach": to_reach,
                "floor_s": floor,
                "over_floor": Spread.of(times[0]).median / floor,
            }
        )
    return rows


def in_turns(
    works: tuple[Callable[[], None], ...], repeats: int, before: Callable[[], None]
) -> list[list[float]]:
    """Seconds of each work, run in turns, the order reversed every other turn; `before` each is not counted."""
    times: list[list[float]] = [[] for _ in works]
    for turn in range(repeats):
        order = range(len(works)) if turn % 2 == 0 else reversed(range(len(works)))
        for number in order:
            before()
            started = perf_counter()
            works[number]()
            times[number].append(perf_counter() - started)
    return times


def plain_pass(checkpoint: Checkpoint, tokens: torch.Tensor, batch_size: int) -> Callable[[], None]:
    """The tokens through the decoder layers, in memory; no head, as a walk needs none."""
    model = checkpoint.load_model().model

    def run() -> None:
        with torch.inference_mode():
            for batch in tokens.split(batch_size):
                model(batch, use_cache=False)

    return run


def flops(tokens: int, length: int) -> float:
    """Multiply-adds of the plain pass, times two; attention counts the causal half."""
    hidden, ffn = SHAPE["hidden"], SHAPE["ffn"]
    kv = hidden * SHAPE["kv_heads"] // SHAPE["heads"]
    matrices = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * ffn
    return 2.0 * tokens * SHAPE["layers"] * (matrices + hidden * length)


def matmul_rate(dtype: torch.dtype) -> float:
    """FLOPs per second of a matrix product of the feed-forward's shape, the best of five."""
    a = torch.randn(2048, SHAPE["hidden"]).to(dtype)
    b = torch.randn(SHAPE["ffn"], SHAPE["hidden"]).to(dtype)
    best = 0.0
    for _ in range(5):
        started = perf_counter()
        torch.nn.functional.linear(a, b)
        best = max(best, 2.0 * a.numel() * SHAPE["ffn"] / (perf_counter() - started))
    return best


if __name__ == "__main__":
    main()
