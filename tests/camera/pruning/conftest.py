"""Tiny checkpoints for pruning, each built once, and the four steps in a row."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import read_tensors, write_tensors
from camera.checkpoints.weights import SINGLE_NAME
from camera.options import CaptureOptions, PruneOptions
from camera.progress import Progress
from camera.pruning.folders import Scored
from camera.pruning.plan import plan_prune
from camera.pruning.stages import capture, prune, save, score
from camera.pruning.summary import Pruned
from tests.tiny import TOKENS, tiny_checkpoint

Entry = TypeVar("Entry")
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama, tied, 3 shards": {"model_type": "llama", "tied": True, "shards": 3},
    "qwen2, tied": {"model_type": "qwen2", "tied": True},
    "qwen2, 172 channels": {"model_type": "qwen2", "ffn": 172},
    "qwen3, 172 channels, 3 shards": {"model_type": "qwen3", "ffn": 172, "shards": 3},
    "PanguEmbedded": {"model_type": "PanguEmbedded"},
    "PanguEmbedded, 172 channels, 3 shards": {"model_type": "PanguEmbedded", "ffn": 172, "shards": 3},
}
ONE_OF_EACH_FAMILY = (
    "llama, tied, 3 shards",
    "qwen2, 172 channels",
    "qwen3, 172 channels, 3 shards",
    "PanguEmbedded, 172 channels, 3 shards",
)
PROPAGATIONS = ("one-shot", "sequential")
PRUNE = PruneOptions(ratio=0.3, reduce_ratio=0.6, multiple_of=4)


def only(layers: Sequence[Mapping[str, Entry]]) -> list[Entry]:
    """What is said of the one block of every dense layer."""
    assert all(set(blocks) == {""} for blocks in layers)
    return [blocks[""] for blocks in layers]


def only_kept(pruned: Pruned) -> list[torch.Tensor]:
    """The channels that stay of every dense layer."""
    return only([stays.kept for stays in pruned.stays()])


def only_scores(folder: Path, count: int) -> list[torch.Tensor]:
    """The importance in every dense layer."""
    return only(Scored.read(folder, count).layers)


class Steps(NamedTuple):
    """The folders of one run of capture, score, prune and save."""

    captured: Path
    scored: Path
    pruned: Path
    saved: Path


Build = Callable[..., Path]


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """The folder of a tiny checkpoint of three layers; each is built once and must not be changed."""

    @cache
    def cached(**sizes: Any) -> Path:
        return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), layers=3, **sizes)

    return cached


@pytest.fixture
def tokens() -> torch.Tensor:
    """Five calibration windows: no multiple of a batch of two."""
    return torch.randint(0, TOKENS, (5, 24), generator=torch.Generator().manual_seed(7))


def run_steps(
    folder: Path,
    tokens_ST: torch.Tensor,
    work: Path,
    options: PruneOptions = PRUNE,
    **capture_options: Any,
) -> Steps:
    """Capture, score, prune and save, as the stages call them."""
    steps = Steps(*(work / name for name in Steps._fields))
    for step in steps:
        step.mkdir(parents=True)
    checkpoint = Checkpoint.open(folder)
    capturing = CaptureOptions(**{"device": "cpu", "batch_size": 2, **capture_options})
    plan = plan_prune(checkpoint, capturing, options)
    capture(checkpoint, tokens_ST, steps.captured, capturing, plan)
    score(checkpoint, steps.captured, steps.scored, options.reduce_ratio)
    prune(checkpoint, steps.scored, steps.pruned, plan, options, steps.captured)
    save(checkpoint, steps.pruned, steps.saved)
    return steps


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class KilledError(Exception):
    """Stands for a signal: raised where the work tells its progress."""


def kill_at(limit: int) -> Progress:
    """A listener that stops the work once so much is done."""

    def progress(done: int, total: int) -> None:
        if done >= limit:
            raise KilledError

    return progress


@pytest.fixture
def read_names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tensors that were read and checked, in order."""
    names: list[str] = []
    read_finite = Checkpoint.read_finite

    def noting(self: Checkpoint, name: str) -> torch.Tensor:
        names.append(name)
        return read_finite(self, name)

    monkeypatch.setattr(Checkpoint, "read_finite", noting)
    return names


def change_tensors(folder: Path, change: dict[str, torch.Tensor]) -> Path:
    """Write other values for some tensors of a single-file checkpoint."""
    tensors = {name: value.clone() for name, value in read_tensors(folder / SINGLE_NAME).items()}
    write_tensors(folder / SINGLE_NAME, {**tensors, **change})
    return folder


def logits(folder: Path, tokens_ST: torch.Tensor) -> torch.Tensor:
    """float32 [samples, tokens, vocabulary] of a checkpoint that transformers loads."""
    with torch.no_grad():
        return Checkpoint.open(folder).load_model(torch.float32)(tokens_ST).logits
