"""What pruning a mixture of experts loses: fewer experts, narrower experts, both, and CAMERA's joint mask.

    python benchmarks/moe_quality.py --json moe-quality.json            # both models; trains the second where it is absent
    python benchmarks/moe_quality.py --models qwen3_moe --ratios 0.4

Two trained models with uneven experts: `tiny-qwen3-moe` of the shared data, and a DeepSeek-V2 that `scripts/train_moe.py`
trains. Every row is a folder that `prune_checkpoint` wrote, loaded by transformers in float32. Widths are rounded, and the
joint masks, which need no rounding, take as many channels as `auto, refit` does. Differences are paired: the mean of the
windows' differences of ln perplexity, with the interval that 95 % of 10,000 resamples of the windows lie in.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import ROOT, parser_of, save, show
from moe_quality_table import JOINT, OURS, WHOLE, goals, lines_of, perplexities
from torch.nn.functional import cross_entropy

from camera.checkpoints.checkpoint import Checkpoint
from camera.errors import CameraError
from camera.files import read_json
from camera.layerwise.statistics import BlockStatistics, Labelled, read_statistics
from camera.options import CaptureOptions, PruneOptions
from camera.pruning.folders import STATISTICS, Scored, read_kept
from camera.pruning.plan import plan_prune
from camera.pruning.prune_checkpoint import prune_checkpoint
from camera.pruning.stages import capture, prune, score
from camera.pruning.stages import save as save_model
from camera.pruning.summary import SUMMARY

LENGTH = 512
"""Tokens in a window."""
_BATCH = 5


@dataclass(frozen=True)
class Windows:
    """Some of the whole windows of a text that is tokenised in one piece."""

    file: str
    start: int
    count: int
    step: int = 1

    def read(self, checkpoint: Checkpoint, folder: Path) -> torch.Tensor:
        """int64 [count, LENGTH].

        Raises:
            CameraError: if the text is absent, or too short.
        """
        path = folder / self.file
        if not path.is_file():
            raise CameraError(f"{path} is absent: name the folder of the texts with --shared")
        text = path.read_text(encoding="utf-8").replace("<|endoftext|>", "")
        ids = torch.tensor(checkpoint.load_tokenizer()(text, verbose=False)["input_ids"])
        windows_WT = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
        chosen_WT = windows_WT[self.start :: self.step][: self.count]
        if len(chosen_WT) < self.count:
            raise CameraError(f"{path} has {len(windows_WT)} windows of {LENGTH} tokens: too few")
        return chosen_WT


@dataclass(frozen=True)
class Subject:
    """A model, the text that it is calibrated on, and others that it is measured on."""

    calibration: Windows
    held_out: dict[str, Windows]


SUBJECTS = {
    "qwen3_moe": Subject(
        Windows("manuals_sample.txt", 40, 32, 16),
        {
            "manuals": Windows("manuals_sample.txt", 0, 30),
            "WikiText-2": Windows("wikitext2_test_raw.txt", 0, 20),
        },
    ),
    "deepseek_v2": Subject(  # the stories behind window 957 were not trained on
        Windows("tinystories_sample.txt", 1002, 32, 4),
        {"stories": Windows("tinystories_sample.txt", 960, 40)},
    ),
}


@dataclass(frozen=True)
class Way:
    """One way to spend the ratio."""

    options: dict[str, Any] = field(default_factory=dict)
    averaged: bool = False
    """Whether an expert's importance is divided by its tokens."""
    ratio_is_of_experts: bool = False


_JOINT = {"scope": "layer", "mode": "mask", "multiple_of": 1}
WAYS = {
    JOINT: Way(_JOINT),
    "the same, averaged over tokens": Way(_JOINT, averaged=True),
    "one width": Way(),
    "one width, refit": Way({"method": "refit", "damping": 1e-2}),
    WHOLE: Way(ratio_is_of_experts=True),
    "auto": Way({"experts": "auto"}),
    OURS: Way({"experts": "auto", "method": "refit", "damping": 1e-2}),
}
"""By name; the first is what the others are compared with."""


@torch.inference_mode()
def losses(folder: Path, texts: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    """The mean loss in nats of every window of each text, over all tokens but the first."""
    model = Checkpoint.open(folder).load_model(torch.float32)
    model.set_experts_implementation("eager")  # the fused ones want widths that are multiples of 8

    def loss_of(batch_BT: torch.Tensor) -> torch.Tensor:
        logits_BVT = model(input_ids=batch_BT, use_cache=False).logits[:, :-1].mT
        return cross_entropy(logits_BVT, batch_BT[:, 1:], reduction="none").double().mean(1)

    return {
        name: torch.cat([loss_of(batch_BT) for batch_BT in windows_WT.split(_BATCH)]).tolist()
        for name, windows_WT in texts.items()
    }


def averaged(
    scores: Labelled[torch.Tensor], statistics: Labelled[BlockStatistics]
) -> dict[str, torch.Tensor]:
    """A layer's importances per token that visits the block, instead of over all of them."""
    return {label: scores_F / max(1, statistics[label].tokens) for label, scores_F in scores.items()}


def prune_averaged(
    checkpoint: Checkpoint, tokens_ST: torch.Tensor, out: Path, how: CaptureOptions, options: PruneOptions
) -> dict[str, Any]:
    """Prune as the stages do, with the importance of each block divided by its tokens, and say what stayed."""
    plan, count = plan_prune(checkpoint, how, options), checkpoint.layer_count
    with tempfile.TemporaryDirectory(prefix="camera-benchmark-") as scratch:
        names = ("captured", "scored", "averaged", "pruned")
        captured, scored, rescored, pruned = (Path(scratch) / name for name in names)
        for folder in (captured, scored, rescored, pruned, out):
            folder.mkdir()
        capture(checkpoint, tokens_ST, captured, how, plan)
        score(checkpoint, captured, scored, options.reduce_ratio)
        summed, statistics = Scored.read(scored, count), read_statistics(captured / STATISTICS, count)
        layers = [averaged(*pair) for pair in zip(summed.layers, statistics, strict=True)]
        Scored(layers, summed.routed, summed.idle).write(rescored, options.reduce_ratio)
        prune(checkpoint, rescored, pruned, plan, options)
        save_model(checkpoint, pruned, out)
        return described(checkpoint, pruned)


def options_of(way: Way, ratio: float, arguments: argparse.Namespace) -> PruneOptions:
    """What the tool is asked for."""
    share = {"ratio": 0.0, "experts": ratio} if way.ratio_is_of_experts else {"ratio": ratio}
    alpha = {"reduce_ratio": arguments.alpha, "multiple_of": arguments.multiple_of}
    return PruneOptions.model_validate({**alpha, **share, **way.options})


def measure(name: str, folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for the dense model, and for every ratio and way."""
    subject, checkpoint = SUBJECTS[name], Checkpoint.open(folder)
    texts_of = arguments.shared / "text"
    texts = {text: windows.read(checkpoint, texts_of) for text, windows in subject.held_out.items()}
    tokens_ST = subject.calibration.read(checkpoint, texts_of)
    how = CaptureOptions(propagate=arguments.propagate, device="cpu", dtype="float32")
    dense = losses(folder, texts)
    rows = [
        {"model": name, "ratio": 0.0, "way": "dense", "size": "", "share": 0.0, "gone": {}, "loss": dense}
    ]
    for ratio in arguments.ratios:
        found: dict[str, dict[str, Any]] = {}
        for label in dict.fromkeys([OURS, JOINT, *arguments.ways]):
            way = WAYS[label]
            same_size = found[OURS]["share"] if way.options.get("mode") == "mask" else ratio
            options = options_of(way, same_size, arguments)
            with tempfile.TemporaryDirectory(prefix="camera-benchmark-") as scratch:
                out = Path(scratch) / "pruned"
                work = prune_averaged if way.averaged else _prune
                found[label] = {"model": name, "ratio": ratio, "way": label}
                found[label] |= work(checkpoint, tokens_ST, out, how, options)
                found[label] |= {"loss": losses(out, texts)}
            print(f"{name} {ratio:.0%} {label}: {perplexities(found[label])}", file=sys.stderr, flush=True)
        rows += [found[label] for label in WAYS if label in found]
    return rows


def _prune(
    checkpoint: Checkpoint, tokens_ST: torch.Tensor, out: Path, how: CaptureOptions, options: PruneOptions
) -> dict[str, Any]:
    """Prune as a user does, and say what stayed."""
    said: dict[str, Any] = {}

    def note(_: Path, decided: Path) -> None:
        said.update(described(checkpoint, decided))

    prune_checkpoint(checkpoint, tokens_ST, out, how, options, finish=note)
    return said


def described(checkpoint: Checkpoint, decided: Path) -> dict[str, Any]:
    """What a folder of `prune` keeps: experts × width, the share of channels that goes, and other ways to split a budget."""
    summary, channels = read_json(decided / SUMMARY), Counter[tuple[str, str]]()
    for layer, stays in enumerate(read_kept(decided, checkpoint.layer_count)):
        for block in checkpoint.blocks(layer) if checkpoint.is_sparse(layer) else ():
            kind = "shared" if block.expert is None else "routed"
            channels[kind, "all"] += block.width(checkpoint.config)
            channels[kind, "kept"] += len(stays.kept.get(block.label, ()))
    kinds = sorted({kind for kind, _ in channels})
    width = "own" if summary["mode"] == "mask" else summary["kept_width"]
    return {
        "size": f"{summary['experts_kept']} × {width}",
        "share": 1
        - sum(channels[kind, "kept"] for kind in kinds) / sum(channels[kind, "all"] for kind in kinds),
        "gone": {kind: 1 - channels[kind, "kept"] / channels[kind, "all"] for kind in kinds},
        "considered": summary.get("considered", []),
    }


def folder_of(name: str, arguments: argparse.Namespace) -> Path:
    """Where the model is; the second is trained where it is absent."""
    if name == "qwen3_moe":
        return Path(arguments.shared / "models" / "tiny-qwen3-moe")
    if not arguments.second.is_dir():
        command = [sys.executable, str(ROOT / "scripts" / "train_moe.py"), "--out", str(arguments.second)]
        subprocess.run([*command, "--texts", str(arguments.shared / "text")], check=True)
    return Path(arguments.second)


def main() -> None:
    """Measure, print a table for each model, and write JSON if asked."""
    parser = parser_of(__doc__, models=list(SUBJECTS), ratios=[0.2, 0.4], alpha=0.95, multiple_of=8)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS), metavar="WAY")
    parser.add_argument("--propagate", default="one-shot", choices=["one-shot", "sequential"])
    shared = Path(os.environ.get("CAMERA_SHARED_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument(
        "--shared", type=Path, default=shared, help="folder with text/ and models/ (default: %(default)s)"
    )
    second = ROOT / ".camera" / "quality" / "moe"
    parser.add_argument("--second", type=Path, default=second, help="the second model (default: %(default)s)")
    arguments = parser.parse_args()
    measured = []
    for name in arguments.models:
        try:
            rows = measure(name, folder_of(name, arguments), arguments)
        except CameraError as error:
            parser.exit(2, f"{error}\n")
        texts = " | ".join(f"{text} | over the joint mask" for text in SUBJECTS[name].held_out)
        show(
            f"{name}, {arguments.propagate}",
            f"fewer | what goes | experts × width | gone: routed, shared | {texts}",
            lines_of(rows),
            left=3,
        )
        show(f"{name}: {OURS}", "fewer | over | on | by | to reach | ", goals(rows), left=3)
        measured += rows
    save(arguments.json, rows=measured)


if __name__ == "__main__":
    main()
