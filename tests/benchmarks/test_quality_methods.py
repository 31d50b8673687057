"""The benchmark's own pruning is that of the tool, so that only the scores differ."""

from pathlib import Path

import pytest
import torch
from quality_methods import BASELINE, METHODS, prune_by, pruned
from quality_scores import Layer

from camera.checkpoints.checkpoint import Checkpoint
from camera.layerwise.statistics import LayerStatistics
from camera.options import PruneOptions
from camera.pruning.importance import importance
from tests.tiny import TOKENS, tiny_checkpoint

PRUNE = PruneOptions(ratio=0.4, multiple_of=8)


def tokens() -> torch.Tensor:
    return torch.randint(TOKENS, (20, 48), generator=torch.Generator().manual_seed(3))


def camera_score(layer: Layer) -> torch.Tensor:
    statistics = LayerStatistics.zeros(layer.down_HF.shape[1])
    statistics.update(layer.act_TF[None])
    return importance(statistics, layer.down_HF, 0.95)


@pytest.mark.parametrize("mode", ["one-shot", "sequential"])
def test_with_cameras_score_it_makes_the_model_that_the_tool_makes(mode: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path / "dense", "qwen2", layers=3))
    tool, _ = pruned(checkpoint, tokens(), METHODS[BASELINE], PRUNE, 0, mode)
    ours = prune_by(checkpoint, tokens(), camera_score, 120, mode == "sequential")
    weights, expected = ours.state_dict(), tool.state_dict()
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("name", METHODS)
def test_every_method_keeps_the_same_width(name: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path / "dense"))
    model, _ = pruned(checkpoint, tokens(), METHODS[name], PRUNE, 0, "sequential")
    shapes = {tuple(layer.mlp.down_proj.weight.shape) for layer in model.get_decoder().layers}
    assert shapes == {(64, 120)}
    assert torch.isfinite(model(torch.arange(32)[None]).logits).all()


def test_refits_that_the_tool_refuses_are_counted(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path / "dense"))
    too_few = tokens()[:4]
    assert pruned(checkpoint, too_few, METHODS["refit"], PRUNE, 0, "sequential")[1] == 2
    assert pruned(checkpoint, too_few, METHODS[BASELINE], PRUNE, 0, "sequential")[1] == 0
