"""The scores that CAMERA's importance is held against; and the benchmark's own pruning is that of the tool."""

from pathlib import Path

import pytest
import torch
from quality_methods import (
    BASELINE,
    METHODS,
    Layer,
    flap,
    prune_by,
    pruned,
    random_scores,
    wanda_sp,
    weight_norm,
)

from camera.checkpoints.checkpoint import Checkpoint
from camera.layerwise.statistics import StatisticsSum
from camera.options import PruneOptions
from camera.pruning.importance import importance
from tests.tiny import TOKENS, tiny_checkpoint

PRUNE = PruneOptions(ratio=0.4, multiple_of=8)


def tokens() -> torch.Tensor:
    return torch.randint(TOKENS, (20, 48), generator=torch.Generator().manual_seed(3))


def camera_score(layer: Layer) -> torch.Tensor:
    total = StatisticsSum(layer.down_HF.shape[1], torch.device("cpu"))
    total.update(layer.act_TF[None])
    return importance(total.read(), layer.down_HF, 0.95)


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


HIDDEN, WIDTH, SEEN = 3, 5, 7


def layer(index: int = 0) -> Layer:
    generator = torch.Generator().manual_seed(index)
    gate_FH, up_FH = torch.randn(2, WIDTH, HIDDEN, generator=generator)
    return Layer(
        index,
        gate_FH,
        up_FH,
        torch.randn(HIDDEN, WIDTH, generator=generator),
        torch.randn(SEEN, WIDTH, generator=generator),
    )


def test_random_scores_depend_on_the_seed_and_the_layer_alone() -> None:
    first = random_scores(layer(0), 1)
    assert torch.equal(first, random_scores(layer(0), 1))
    assert not torch.equal(first, random_scores(layer(0), 2))
    assert not torch.equal(first, random_scores(layer(1), 1))


def test_weight_norm_is_of_all_three_parts_of_a_channel() -> None:
    one = layer()
    for channel, score in enumerate(weight_norm(one, 0).tolist()):
        parts = torch.cat([one.gate_FH[channel], one.up_FH[channel], one.down_HF[:, channel]])
        assert abs(score - float(parts.double().norm())) < 1e-6


def test_wanda_sp_is_the_mean_weight_times_the_norm_of_the_activation() -> None:
    one = layer()
    for channel, score in enumerate(wanda_sp(one, 0).tolist()):
        norm = sum(float(a) ** 2 for a in one.act_TF[:, channel]) ** 0.5
        mean = sum(abs(float(w)) * norm for w in one.down_HF[:, channel]) / HIDDEN
        assert abs(score - mean) < 1e-6


def test_flap_gives_nothing_for_a_channel_that_never_changes_however_large() -> None:
    one = layer()
    one.act_TF[:, 2] = 100.0
    scores = flap(one, 0)
    assert scores[2] == 0
    variance = sum((float(a) - float(one.act_TF[:, 0].mean())) ** 2 for a in one.act_TF[:, 0]) / (SEEN - 1)
    assert abs(float(scores[0]) - variance * float(one.down_HF[:, 0].square().sum())) < 1e-5
