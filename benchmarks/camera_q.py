"""What few bits lose of a mixture of experts: 4-bit blocks by method, and CAMERA-Q simulated beside uniform bits.

    python benchmarks/camera_q.py --json camera-q.json
    python benchmarks/camera_q.py --rows "GPTQ, Q4_0" "2 bits for all"

Perplexity of `tiny-qwen3-moe` of the shared data on held-out windows, as in `moe_quality.py`, and the mean divergence in nats
from the model as it is, on the first text. Only the experts' matrices are rounded; `bits` are theirs, with their scales. A row
that is not of Q4_0 or Q8_0 is simulated: a checkpoint that holds the rounded numbers.
"""

import os
import tempfile
from collections.abc import Callable
from math import prod
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from common import ROOT, parser_of, save, show
from moe_quality import LENGTH, SUBJECTS

from camera.checkpoints.checkpoint import Checkpoint
from camera.errors import CameraError
from camera.evaluation.divergence import divergence
from camera.evaluation.perplexity import perplexity
from camera.options import BlockType, CaptureOptions, PruneOptions, QuantizeOptions
from camera.pruning.execute import decide
from camera.pruning.plan import plan_prune
from camera.quantization.camera_q import CameraQ, Group, simulate_camera_q
from camera.quantization.execute import quantize_checkpoint
from camera.quantization.plan import plan_types

Measured = tuple[Path, float]
"""A folder that can be evaluated, and the bits of its experts' weights."""
_EXPERTS: dict[str, BlockType] = {"*.experts.*": "q4_0"}
_MIXED_BITS = 6.5
"""Half the experts' weights in Q8_0, half in Q4_0."""
Way = Callable[[Checkpoint, torch.Tensor, Path], Measured]


def blocks_of(method: str) -> Way:
    """Experts in 4-bit blocks, all else in 32 bits."""

    def make(checkpoint: Checkpoint, tokens_ST: torch.Tensor, out: Path) -> Measured:
        options = QuantizeOptions(type="f32", overrides=_EXPERTS, method=method, device="cpu")
        return _packed(checkpoint, out, options, tokens_ST)

    return make


def finer_layers(checkpoint: Checkpoint, tokens_ST: torch.Tensor, out: Path) -> Measured:
    """Q8_0 for the experts of the layers whose channels have the most CAMERA importance together, Q4_0 for the others'."""
    capture = CaptureOptions(device="cpu", dtype="float32", propagate="one-shot")
    plan = plan_prune(checkpoint, capture, PruneOptions(ratio=0.5, multiple_of=1))
    with tempfile.TemporaryDirectory() as work:
        importance = [
            float(sum(block.scores_F.sum() for block in decision.blocks))
            for decision in decide(checkpoint, tokens_ST, plan, capture, Path(work))
        ]
    best = sorted(range(len(importance)), key=lambda layer: -importance[layer])[: len(importance) // 2]
    overrides = _EXPERTS | {f"*.layers.{layer}.*.experts.*": "q8_0" for layer in best}
    return _packed(checkpoint, out, QuantizeOptions(type="f32", overrides=overrides), tokens_ST)


def finer_tensors(checkpoint: Checkpoint, tokens_ST: torch.Tensor, out: Path) -> Measured:
    """As many bits, given out by `target_bpw`."""
    planned = plan_types(checkpoint, QuantizeOptions(type="f32", overrides=_EXPERTS))
    bits = [(_MIXED_BITS if each.type == "q4_0" else 32) * prod(each.shape) for each in planned]
    fixed = [each.name for each in planned if each.type == "f32" and _may_be_named(each.name, each.shape)]
    options = QuantizeOptions(
        type="q4_0",
        overrides=dict.fromkeys(fixed, "f32"),
        target_bpw=sum(bits) / sum(prod(each.shape) for each in planned),
        device="cpu",
    )
    return _packed(checkpoint, out, options, tokens_ST)


def _packed(checkpoint: Checkpoint, out: Path, options: QuantizeOptions, tokens_ST: torch.Tensor) -> Measured:
    report = quantize_checkpoint(checkpoint, out, options, tokens_ST)
    experts = [record for record in report.tensors if ".experts." in record.name]
    bits = sum(record.parameters * record.bits_per_weight for record in experts)
    return out, bits / sum(record.parameters for record in experts)


def _may_be_named(name: str, shape: tuple[int, ...]) -> bool:
    """Whether an override may name a tensor: matrices but routers."""
    return len(shape) == 2 and not name.endswith("mlp.gate.weight")


def simulated(*groups: Group, scope: str = "layer", compensates: bool = True) -> Way:
    """Experts with the numbers that so few bits would leave."""

    def make(checkpoint: Checkpoint, tokens_ST: torch.Tensor, out: Path) -> Measured:
        scheme = CameraQ(groups, scope, compensates=compensates)  # type: ignore[arg-type]
        summary = simulate_camera_q(checkpoint, out, tokens_ST, scheme, QuantizeOptions(device="cpu"))
        return out, summary["bits_per_weight"]

    return make


_FEWER = Group(3, 0.23), Group(2, 0.5), Group(1, 0.27)
"""Groups for 2.25 bits with the steps of this model's narrow experts."""
WAYS: dict[str, Way] = {
    "nearest, Q4_0": blocks_of("rtn"),
    "search, Q4_0": blocks_of("search"),
    "GPTQ, Q4_0": blocks_of("gptq"),
    "half Q8_0: layers by importance": finer_layers,
    "half Q8_0: `target_bpw`": finer_tensors,
    "4 bits for all": simulated(Group(4, 1.0)),
    "3 bits for all": simulated(Group(3, 1.0)),
    "2 bits for all": simulated(Group(2, 1.0)),
    "CAMERA-Q, 3/2/1 bits, a layer's channels": simulated(*_FEWER),
    "CAMERA-Q, 3/2/1 bits, each expert's channels": simulated(*_FEWER, scope="expert"),
    "2 bits for all, not compensated": simulated(Group(2, 1.0), compensates=False),
    "CAMERA-Q, a layer's channels, not compensated": simulated(*_FEWER, compensates=False),
    "CAMERA-Q, shares farther apart": simulated(Group(3, 0.35), Group(2, 0.26), Group(1, 0.39)),
    "CAMERA-Q, shares nearer": simulated(Group(3, 0.08), Group(2, 0.8), Group(1, 0.12)),
}


def main() -> None:
    """Measure, print a table, and write JSON if asked."""
    parser = parser_of(__doc__)
    parser.add_argument("--rows", nargs="+", default=list(WAYS), choices=list(WAYS), metavar="ROW")
    shared = Path(os.environ.get("CAMERA_SHARED_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument(
        "--shared", type=Path, default=shared, help="folder with text/ and models/ (default: %(default)s)"
    )
    arguments = parser.parse_args()
    try:
        rows = measure(arguments.shared, arguments.rows)
    except CameraError as error:
        parser.exit(2, f"{error}\n")
    texts = list(SUBJECTS["qwen3_moe"].held_out)
    show(
        "tiny-qwen3-moe: perplexity",
        " | ".join(("experts", "bits", *texts, "KL", "s")),
        (
            (
                row["way"],
                f"{row['bits']:.3f}",
                *(f"{row[text]:.2f}" for text in texts),
                f"{row['divergence']:.5f}",
                f"{row['seconds']:.0f}",
            )
            for row in rows
        ),
    )
    save(arguments.json, rows=rows)


def measure(shared: Path, ways: list[str]) -> list[dict[str, Any]]:
    """A row for the model as it is, and one for every way."""
    checkpoint, subject = Checkpoint.open(shared / "models" / "tiny-qwen3-moe"), SUBJECTS["qwen3_moe"]
    tokens_ST = subject.calibration.read(checkpoint, shared / "text")
    texts = {name: windows.read(checkpoint, shared / "text") for name, windows in subject.held_out.items()}

    def perplexities(folder: Path) -> dict[str, float]:
        return {
            name: perplexity(
                folder, text_WT.flatten(), window=LENGTH, dtype="float32", device="cpu"
            ).perplexity
            for name, text_WT in texts.items()
        }

    def row(way: str, bits: float, folder: Path, seconds: float) -> dict[str, Any]:
        first = next(iter(texts.values())).flatten()
        lost = divergence(reference, folder, first, window=LENGTH, dtype="float32", device="cpu").divergence
        return {"way": way, "bits": bits, **perplexities(folder), "divergence": lost, "seconds": seconds}

    bits = 8.0 * checkpoint.dtype.itemsize
    reference = checkpoint.load_model(torch.float32)
    rows = [row("as it is", bits, checkpoint.folder, 0.0)]
    with tempfile.TemporaryDirectory() as work:
        for number, way in enumerate(ways):
            start = perf_counter()
            folder, bits = WAYS[way](checkpoint, tokens_ST, Path(work) / str(number))
            seconds = perf_counter() - start
            rows.append(row(way, bits, folder, seconds))
    return rows


if __name__ == "__main__":
    main()
