"""What a split of a budget between experts and channels is said to cost."""

from pathlib import Path

import pytest
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import read_tensors
from camera.layerwise.statistics import read_statistics
from camera.options import CaptureOptions, PruneOptions
from camera.pruning.decision import routed_from
from camera.pruning.folders import STATISTICS
from camera.pruning.importance import block_importance
from camera.pruning.plan import Split, plan_prune
from camera.pruning.split import in_order, split_losses
from camera.pruning.stages import capture
from tests.tiny import TOKENS, tiny_moe_checkpoint

ONE_SHOT = CaptureOptions(propagate="one-shot", device="cpu", dtype="float32")
AUTO = PruneOptions(ratio=0.4, experts="auto", multiple_of=8)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "qwen2_moe", "deepseek_v2"])
def test_it_costs_the_experts_that_go_and_the_channels_that_go_from_all_that_stays(
    tmp_path: Path, model_type: str
) -> None:
    checkpoint = Checkpoint.open(tiny_moe_checkpoint(tmp_path / "model", model_type))
    plan = plan_prune(checkpoint, ONE_SHOT, AUTO)
    tokens_ST = torch.randint(TOKENS, (4, 64), generator=torch.Generator().manual_seed(0))
    (tmp_path / "out").mkdir()
    capture(checkpoint, tokens_ST, tmp_path / "out", ONE_SHOT)
    statistics = read_statistics(tmp_path / "out" / STATISTICS, 3)
    routed = routed_from(read_tensors(tmp_path / "out" / STATISTICS), 3)
    found = split_losses(checkpoint, plan, statistics, routed)
    assert {(split.experts_kept, split.kept) for split in found} == set(plan.candidates)
    for split in found:
        narrower, expected = plan.narrowed_to(split.experts_kept, split.kept), 0.0
        for layer, of_layer in enumerate(routed):
            if of_layer is None:
                continue
            order = of_layer.energy_E.argsort(descending=True).tolist()
            dropped = order[split.experts_kept :]
            lost = float(of_layer.energy_E[dropped].sum())
            for block in checkpoint.blocks(layer):
                if block.expert not in dropped:
                    scores_F = block_importance(checkpoint, block, statistics[layer][block.label], 0.0)
                    gone = len(scores_F) - narrower.kept_of(block, len(scores_F))
                    lost += float(scores_F.sort().values[:gone].sum())
            expected += lost / float(of_layer.stream)
        assert split.loss == pytest.approx(expected, rel=1e-9)


def test_of_splits_that_cost_nearly_the_same_the_one_of_more_experts_is_taken() -> None:
    few, some, many = Split(10, 184, 1.00), Split(12, 153, 1.09), Split(14, 131, 1.11)
    assert in_order([many, some, few]) == [some, few, many]
    assert in_order([many, few]) == [few, many]
