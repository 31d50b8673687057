"""The price of pruning a mixture of experts of Qwen3-30B-A3B's shapes: 128 experts, 8 for a token, 2048 → 768, bf16.

    python benchmarks/moe.py --json moe.json

Three tables. One layer: capture, choose and narrow every expert, against transformers' own way through the same layer:
loading it, which fuses its experts into one tensor, and a forward pass. Peak memory on two layers, without what Python
and torch take, against two layers' attention, four experts' matrices and three times the hidden states. Files: prune
and save four layers, quantise and write the GGUF, against a copy of the source. In a temporary folder of 15 GB.
"""

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import (
    Seconds,
    apart,
    cpu,
    in_turns,
    met,
    parser_of,
    random_tokens,
    ratio,
    save,
    show,
    span,
    timed,
)

from camera.benchmark.report import Spread
from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.synthetic import write_moe_checkpoint
from camera.devices import peak_memory_bytes
from camera.formats.convert import convert_to_gguf
from camera.options import CaptureOptions, PruneOptions, QuantizeOptions
from camera.pruning.execute import decide
from camera.pruning.plan import plan_prune
from camera.pruning.prune_checkpoint import prune_checkpoint
from camera.quantization.execute import quantize_checkpoint
from camera.units import bytes_text, seconds_text

VOCAB = 1024
RATIO = 0.2
TIME, MEMORY, LIMIT_BYTES, FILES = 1.05, 1.5, 1.5e9, 4.0


def main() -> None:
    """Measure, print the tables, and write JSON if asked."""
    parser = parser_of(__doc__, repeats=3, samples=8, length=512, file_layers=4)
    parser.add_argument("--folder", type=Path, help="where to put the temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="camera-benchmark-", dir=arguments.folder) as folder:
        layer = one_layer(Path(folder), arguments)
        memory = two_layers(Path(folder), arguments)
        files = all_files(Path(folder), arguments.file_layers)
    save(arguments.json, layer=layer, memory=memory, files=files)


def one_layer(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """CPU seconds of both ways through a layer, in turns."""
    checkpoint = Checkpoint.open(write(folder / "one", 1))
    tokens_ST = random_tokens(VOCAB, arguments.samples, arguments.length)
    works = {
        "transformers": lambda: timed(lambda: plain_pass(checkpoint, tokens_ST)),
        "camera": lambda: timed(lambda: pruning_pass(checkpoint, tokens_ST, folder / "work")),
    }
    times: dict[str, list[Seconds]] = in_turns(works, arguments.repeats)
    shutil.rmtree(checkpoint.folder)
    theirs, ours = cpu(times["transformers"]), cpu(times["camera"])
    quotient = ratio(ours.samples, theirs.samples)
    show(
        f"one layer, {tokens_ST.numel()} tokens, CPU seconds",
        "transformers: load and forward | capture, choose and narrow | ratio | spread | to reach | met",
        [
            (
                *(f"{theirs.median:.2f}", f"{ours.median:.2f}", f"{quotient.median:.2f}", span(quotient)),
                *(f"≤ {TIME}", met(quotient.median <= TIME)),
            )
        ],
        left=0,
    )
    return {"transformers_s": theirs, "camera_s": ours, "ratio": quotient, "to_reach": TIME}


def plain_pass(checkpoint: Checkpoint, tokens_ST: torch.Tensor) -> None:
    """What transformers does to compute the layer."""
    model = checkpoint.load_model().model
    with torch.inference_mode():
        for batch_BT in tokens_ST.split(4):
            model(batch_BT, use_cache=False)


def pruning_pass(checkpoint: Checkpoint, tokens_ST: torch.Tensor, work: Path) -> None:
    """Statistics, choice and narrowed output of every expert; nothing is written."""
    work.mkdir(exist_ok=True)
    capture = CaptureOptions(propagate="sequential", batch_size=4, device="cpu")
    plan = plan_prune(checkpoint, capture, PruneOptions(ratio=RATIO))
    for decision in decide(checkpoint, tokens_ST, plan, capture, work):
        assert decision.routed is not None


def two_layers(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of `camera prune` in a process of its own, several times: threads leave holes in the heap by chance."""
    source = write(folder / "two", 2)
    runs = [apart(prune_apart, source, arguments.samples, arguments.length) for _ in range(arguments.repeats)]
    checkpoint = Checkpoint.open(source)
    sizes = {name: info.size_bytes for name, info in checkpoint.tensors.items()}
    blocks = checkpoint.blocks(0)
    experts = {name for block in blocks for name in block.names}
    attention = sum(sizes[name] for name in checkpoint.layer_tensors(0) if name not in experts)
    hidden = arguments.samples * arguments.length * checkpoint.hidden_size * checkpoint.dtype.itemsize
    floor = 2 * attention + 4 * sum(sizes[name] for name in blocks[0].names) + 3 * hidden
    shutil.rmtree(source)
    seconds, peak = (Spread.of([run[name] for run in runs]) for name in ("seconds", "peak_bytes"))
    own = Spread.of([run["peak_bytes"] - run["idle_bytes"] for run in runs])
    over = Spread.of([size / floor for size in own.samples])
    reached = over.median <= MEMORY and peak.high < LIMIT_BYTES
    show(
        "prune two layers",
        "checkpoint | time | peak memory | without Python and torch | floor | ratio | spread | to reach | met",
        [
            (
                *(bytes_text(sum(sizes.values())), seconds_text(seconds.median)),
                *(bytes_text(round(size)) for size in (peak.median, own.median, floor)),
                *(f"{over.median:.2f}", span(over)),
                *(f"≤ {MEMORY} and < {bytes_text(LIMIT_BYTES)}", met(reached)),
            )
        ],
        left=0,
    )
    found = {"seconds": seconds, "peak_bytes": peak, "own_bytes": own}
    return {**found, "floor_bytes": floor, "ratio": over, "to_reach": MEMORY}


def prune_apart(source: Path, samples: int, length: int) -> dict[str, float]:
    """What is measured: one call, as `camera prune` makes it."""
    checkpoint, device = Checkpoint.open(source), torch.device("cpu")
    checkpoint.check_shapes()
    idle = peak_memory_bytes(device)
    tokens_ST, out = random_tokens(VOCAB, samples, length), source.with_name("pruned")
    capture = CaptureOptions(propagate="sequential", batch_size=2, device="cpu")
    seconds, _ = timed(
        lambda: prune_checkpoint(checkpoint, tokens_ST, out, capture, PruneOptions(ratio=RATIO))
    )
    peak = peak_memory_bytes(device)
    shutil.rmtree(out)
    return {"seconds": seconds, "peak_bytes": peak, "idle_bytes": idle}


def all_files(folder: Path, layers: int) -> dict[str, Any]:
    """Seconds from a checkpoint to a pruned one and its GGUF, and of copying the checkpoint."""
    source = write(folder / "source", layers)
    copying, _ = timed(lambda: shutil.copytree(source, folder / "copy"))
    shutil.rmtree(folder / "copy")
    checkpoint, tokens_ST = Checkpoint.open(source), random_tokens(VOCAB, 2, 128)
    capture, pruned = CaptureOptions(device="cpu"), folder / "pruned"
    steps = {
        "prune and save": lambda: prune_checkpoint(
            checkpoint, tokens_ST, pruned, capture, PruneOptions(ratio=RATIO)
        ),
        "quantize": lambda: quantize_checkpoint(
            Checkpoint.open(pruned), folder / "packed", QuantizeOptions(type="q4_0")
        ),
        "convert": lambda: convert_to_gguf(folder / "packed", folder / "model.gguf", name="benchmark"),
    }
    seconds = {name: timed(step)[0] for name, step in steps.items()}
    total, size = sum(seconds.values()), sum(info.size_bytes for info in checkpoint.tensors.values())
    show(
        f"{layers} layers, {bytes_text(size)}, seconds on the clock",
        "copy of the files | prune and save | quantize | convert | all over the copy | to reach | met",
        [
            (
                f"{copying:.1f}",
                *(f"{seconds[name]:.1f}" for name in steps),
                *(f"{total / copying:.1f}", f"≤ {FILES}", met(total <= FILES * copying)),
            )
        ],
        left=0,
    )
    return {"copy_s": copying, "steps_s": seconds, "ratio": total / copying, "to_reach": FILES}


def write(folder: Path, layers: int) -> Path:
    """A checkpoint of so many layers."""
    return write_moe_checkpoint(folder, layers=layers, vocab=VOCAB, dtype=torch.bfloat16)


if __name__ == "__main__":
    main()
