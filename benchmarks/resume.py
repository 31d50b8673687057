"""What a kill -9 costs: pruning is killed at random moments and started again, until it is done.

    python benchmarks/resume.py --kills 5 --json resume.json

Each start tells, with every batch, how far it is. Lost is what was done before a kill and had to be done again. A state is
saved where a kill in the next layer would lose more than a minute; these layers take a second, so that here it is
`--at-risk` seconds. To reach: no more is lost than that, or a layer if that takes longer, and the layer that computes while the
disk takes the state. The result must have the bytes of an undisturbed run.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from common import parser_of, random_tokens, save, show

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.synthetic import write_checkpoint
from camera.digests import digest_folder
from camera.layerwise import resume
from camera.options import CaptureOptions, PruneOptions
from camera.pruning.prune_checkpoint import prune_checkpoint

LAYERS = 16


def main() -> None:
    """Measure, print a table, and write JSON if asked."""
    parser = parser_of(__doc__, kills=5, seed=0, at_risk=2.0)
    parser.add_argument("--prune", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.prune:
        prune(*arguments.prune, arguments.at_risk)
        return
    moments = random.Random(arguments.seed)
    rows = []
    with tempfile.TemporaryDirectory(prefix="camera-benchmark-") as name:
        folder = Path(name)
        shape = {"layers": LAYERS, "hidden": 1024, "ffn": 3200, "vocab": 1024, "heads": 16, "kv_heads": 4}
        write_checkpoint(folder / "model", **shape, dtype=torch.float32)
        risk = arguments.at_risk
        whole = attempt(folder, "undisturbed", None, risk)
        for _ in range(arguments.kills):
            shutil.rmtree(folder / "out", ignore_errors=True)
            killed = attempt(folder, "out", moments.uniform(0.05, 0.95) * LAYERS, risk)
            resumed = attempt(folder, "out", None, risk)
            same = digest_folder(folder / "out") == digest_folder(folder / "undisturbed")
            rows.append(
                {
                    "killed_at_layer": killed["reached"],
                    "resumed_at_layer": resumed["began"],
                    "lost_layers": killed["reached"] - resumed["began"],
                    "start_up_s": resumed["start_up_s"],
                    "same_bytes": same,
                }
            )
    layer_s = (whole["seconds"] - whole["start_up_s"]) / LAYERS
    to_reach = max(risk, layer_s) + layer_s
    show(
        f"{LAYERS} layers, {layer_s:.2f} s each; to lose no more than {to_reach:.1f} s",
        "killed at layer | resumed at layer | lost layers | lost s | start-up s | same bytes | met",
        (
            (
                *(f"{row[name]:.2f}" for name in ("killed_at_layer", "resumed_at_layer", "lost_layers")),
                *(f"{row['lost_layers'] * layer_s:.2f}", f"{row['start_up_s']:.1f}"),
                "yes" if row["same_bytes"] else "NO",
                "yes" if row["lost_layers"] * layer_s <= to_reach and row["same_bytes"] else "no",
            )
            for row in rows
        ),
        left=0,
    )
    save(arguments.json, layer_s=layer_s, rows=rows)


def attempt(folder: Path, out: str, kill_at: float | None, at_risk: float) -> dict[str, Any]:
    """Prune in a process, and kill it when it has passed `kill_at` layers."""
    folders = str(folder / "model"), str(folder / out)
    command = [sys.executable, __file__, "--at-risk", str(at_risk), "--prune", *folders]
    started = perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    began = reached = start_up = None
    assert process.stdout is not None
    for line in process.stdout:
        reached = float(line)
        if began is None:
            began, start_up = float(int(reached)), perf_counter() - started
        if kill_at is not None and reached >= kill_at:
            os.kill(process.pid, signal.SIGKILL)
            break
    code = process.wait()
    if kill_at is None and code != 0:
        raise SystemExit(f"pruning ended with {code}")
    return {"began": began, "reached": reached, "start_up_s": start_up, "seconds": perf_counter() - started}


def prune(source: Path, out: Path, at_risk: float) -> None:
    """Prune once, and print with every batch how many layers are done."""
    resume.RULE = resume.RULE._replace(seconds=at_risk)

    def tell(done: int, total: int) -> None:
        sys.stdout.write(f"{done / total * LAYERS}\n")
        sys.stdout.flush()

    tokens_ST = random_tokens(1024, 16, 256)
    capture = CaptureOptions(batch_size=2, device="cpu")
    prune_checkpoint(Checkpoint.open(source), tokens_ST, out, capture, PruneOptions(ratio=0.2), tell)


if __name__ == "__main__":
    main()
