"""The price of pruning: capture, score, prune and save layer by layer, against one plain forward pass.

    python benchmarks/capture.py --json capture.json

The plain pass runs the same tokens through the same decoder layers, already in memory, in the same batches. Pruning
reads the layers from disk, gathers statistics, selects, and writes the pruned checkpoint. They run in turns, the order
reversed every other turn. To reach: 1.10 times a plain pass one-shot, 1.15 times sequential. The floor is the plain
pass itself: its FLOPs over the rate of a matrix product measured just before.
"""

import argparse
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Seconds, clock, in_turns, parser_of, random_tokens, ratio, save, show, span, timed

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.synthetic import write_checkpoint
from camera.options import CaptureOptions, PruneOptions
from camera.pruning.prune_checkpoint import prune_checkpoint

SHAPE: dict[str, Any] = {"layers": 8, "hidden": 1024, "ffn": 3200, "vocab": 1024, "heads": 16, "kv_heads": 4}
TO_REACH = {"one-shot": 1.10, "sequential": 1.15}


def main() -> None:
    """Measure, print a table, and write JSON if asked."""
    arguments = parser_of(
        __doc__, repeats=5, samples=16, length=512, batch_size=4, dtype=["float32", "bfloat16"]
    ).parse_args()
    with tempfile.TemporaryDirectory(prefix="camera-benchmark-") as folder:
        rows = [row for dtype in arguments.dtype for row in measure(Path(folder), dtype, arguments)]
    show(
        f"{SHAPE}, {arguments.samples} × {arguments.length} tokens",
        "dtype | propagation | plain pass s | pruning s | ratio | spread | to reach | met | plain pass / floor",
        (
            (
                *(row["dtype"], row["propagate"]),
                *(f"{row[name].median:.2f}" for name in ("plain_s", "walk_s")),
                *(f"{row['ratio'].median:.3f}", span(row["ratio"], 3), f"≤ {row['to_reach']:.2f}"),
                "yes" if row["ratio"].median <= row["to_reach"] else "no",
                f"{row['over_floor']:.2f}",
            )
            for row in rows
        ),
        left=2,
    )
    save(arguments.json, shape=SHAPE, rows=rows)


def measure(folder: Path, dtype: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Both propagations of one dtype, each in turns with the plain pass."""
    checkpoint = Checkpoint.open(write_checkpoint(folder / dtype, **SHAPE, dtype=getattr(torch, dtype)))
    tokens_ST = random_tokens(SHAPE["vocab"], arguments.samples, arguments.length)
    plain = plain_pass(checkpoint, tokens_ST, arguments.batch_size)
    floor = flops(tokens_ST.numel(), arguments.length) / matmul_rate(getattr(torch, dtype))
    rows = []
    for propagate, to_reach in TO_REACH.items():
        capture = CaptureOptions(propagate=propagate, batch_size=arguments.batch_size, device="cpu")  # type: ignore[arg-type]
        out = folder / f"{dtype}-{propagate}"

        def prune(capture: CaptureOptions = capture, out: Path = out) -> Seconds:
            shutil.rmtree(out, ignore_errors=True)
            return timed(
                lambda: prune_checkpoint(checkpoint, tokens_ST, out, capture, PruneOptions(ratio=0.2))
            )

        times = in_turns({"plain": lambda: timed(plain), "prune": prune}, arguments.repeats)
        plain_s, walk_s = clock(times["plain"]), clock(times["prune"])
        rows.append(
            {
                **{"dtype": dtype, "propagate": propagate, "plain_s": plain_s, "walk_s": walk_s},
                **{"ratio": ratio(walk_s.samples, plain_s.samples), "to_reach": to_reach},
                **{"floor_s": floor, "over_floor": plain_s.median / floor},
            }
        )
    return rows


def plain_pass(checkpoint: Checkpoint, tokens_ST: torch.Tensor, batch_size: int) -> Callable[[], None]:
    """The tokens through the decoder layers, in memory; no head, as pruning needs none."""
    model = checkpoint.load_model().model

    def run() -> None:
        with torch.inference_mode():
            for batch_BT in tokens_ST.split(batch_size):
                model(batch_BT, use_cache=False)

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
    best = min(timed(lambda: torch.nn.functional.linear(a, b))[0] for _ in range(5))
    return 2.0 * a.numel() * SHAPE["ffn"] / best


if __name__ == "__main__":
    main()
