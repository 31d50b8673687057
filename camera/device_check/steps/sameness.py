"""Whether the device decides as the CPU does: statistics, kept channels, perplexity, tokens, of a small random model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.synthetic import write_checkpoint
from camera.device_check.context import Context
from camera.device_check.schema import Measurement
from camera.engines.torch_engine import TorchEngine
from camera.evaluation.perplexity import perplexity
from camera.loading import load_model
from camera.options import CaptureOptions, PruneOptions
from camera.pruning.decision import Decision
from camera.pruning.execute import decide
from camera.pruning.plan import plan_prune

_SIZES = {"layers": 4, "hidden": 256, "ffn": 1024, "vocab": 512, "heads": 4, "kv_heads": 2}
_SAMPLES, _LENGTH, _DECODED = 16, 64, 24
_STATISTICS, _PERPLEXITY = 1e-4, 1e-4
"""Relative differences that the order of float32 sums explains."""
_CHANNELS = 0.999
"""Of the kept channels: random weights make many almost equal."""
_LOGITS = 0.02
"""By how much of the spread of the logits the CPU's likeliest token may be above the one that the device chose, in 16 bits."""


@dataclass(frozen=True)
class _Decided:
    """By one device."""

    kept: set[tuple[int, str, int]]
    squares: torch.Tensor
    """float64, of all layers."""


def run(context: Context) -> None:
    """Do the same on both, and compare."""
    checkpoint = Checkpoint.open(write_checkpoint(context.scratch / "model", **_SIZES, dtype=torch.float32))
    random = torch.Generator().manual_seed(0)
    tokens_ST = torch.randint(_SIZES["vocab"], (_SAMPLES, _LENGTH), generator=random)
    devices = (str(context.device), "cpu")
    for method in ("camera", "obs"):
        ours, cpu = (
            _decided(checkpoint, tokens_ST, method, device, context.scratch / f"{method}-{number}")
            for number, device in enumerate(devices)
        )
        share = len(ours.kept & cpu.kept) / len(cpu.kept)
        of = {"method": method}
        context.add(Measurement(what="channels kept by both", of=of, value=share, at_least=_CHANNELS))
        off = float((ours.squares - cpu.squares).norm() / cpu.squares.norm())
        context.add(Measurement(what="difference of the statistics", of=of, value=off, at_most=_STATISTICS))
    found, expected = (
        perplexity(
            checkpoint.folder, tokens_ST.flatten(), window=_LENGTH, dtype="float32", device=device
        ).perplexity
        for device in devices
    )
    off = abs(found - expected) / expected
    context.add(Measurement(what="difference of the perplexity", value=off, at_most=_PERPLEXITY))
    _compare_tokens(context)


def _decided(
    checkpoint: Checkpoint, tokens_ST: torch.Tensor, method: str, device: str, work: Path
) -> _Decided:
    options = CaptureOptions(device=device, dtype="float32")
    plan = plan_prune(checkpoint, options, PruneOptions(ratio=0.4, multiple_of=1, method=method))
    work.mkdir()
    decisions: Sequence[Decision] = list(decide(checkpoint, tokens_ST, plan, options, work))
    blocks = [(each.layer, block) for each in decisions for block in each.blocks]
    return _Decided(
        {(layer, block.label, int(channel)) for layer, block in blocks for channel in block.kept_K},
        torch.cat([block.statistics.sum_squares_F for _, block in blocks]),
    )


@torch.inference_mode()
def _compare_tokens(context: Context) -> None:
    """Decode greedily in 16 bits, as the engine does, and ask the CPU in float32 how likely it finds each token."""
    folder = write_checkpoint(context.scratch / "decoded", **_SIZES, dtype=torch.bfloat16)
    engine = TorchEngine(folder, context.device, 8 + _DECODED)
    prompt = list(range(1, 9))
    engine.prefill(prompt)
    tokens = prompt + engine.decode(_DECODED).tolist()
    context.tell(engine=engine.describe())
    logits_TV = load_model(folder, "float32", "cpu")(torch.tensor([tokens])).logits[0, len(prompt) - 1 : -1]
    chosen_T = logits_TV.gather(-1, torch.tensor(tokens[len(prompt) :])[:, None])[:, 0]
    short = float(((logits_TV.amax(-1) - chosen_T) / logits_TV.std(-1)).max())
    context.add(
        Measurement(
            what="how far tokens are from the likeliest",
            of={"tokens": _DECODED},
            value=short,
            at_most=_LOGITS,
        )
    )
