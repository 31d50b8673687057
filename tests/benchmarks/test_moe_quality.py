"""Windows, paired intervals, averaged importance and goals of the benchmark of pruned mixtures of experts."""

from math import exp, expm1, log
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from moe_quality import WAYS, Windows, averaged, losses, prune_averaged
from moe_quality_table import JOINT, OURS, WHOLE, Difference, goals

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import read_tensors
from camera.errors import CameraError
from camera.evaluation.perplexity import perplexity
from camera.layerwise.statistics import BlockStatistics
from camera.options import CaptureOptions, PruneOptions
from camera.pruning.prune_checkpoint import prune_checkpoint
from tests.tiny import TOKENS, tiny_moe_checkpoint


def row(way: str, ratio: float, *perplexities: float) -> dict[str, Any]:
    return {"way": way, "ratio": ratio, "loss": {"text": [log(each) for each in perplexities]}}


def random_windows(count: int, length: int) -> torch.Tensor:
    return torch.randint(TOKENS, (count, length), generator=torch.Generator().manual_seed(0))


def test_the_loss_of_windows_is_that_of_the_evaluation(tmp_path: Path) -> None:
    folder = tiny_moe_checkpoint(tmp_path / "model", "deepseek_v2")
    windows_WT = random_windows(7, 16)
    loss_W = losses(folder, {"text": windows_WT})["text"]
    measured = perplexity(Checkpoint.open(folder).load_model(torch.float32), windows_WT.flatten(), window=16)
    assert exp(fmean(loss_W)) == pytest.approx(measured.perplexity, rel=1e-5)


def test_a_difference_is_paired_so_that_what_windows_share_does_not_widen_it() -> None:
    base_W = torch.rand(40, generator=torch.Generator().manual_seed(0)) * 5
    found = Difference.of(base_W + 0.01, base_W)
    assert found == pytest.approx((expm1(0.01),) * 3, rel=1e-4)
    noisy = Difference.of(base_W, base_W.flip(0))
    assert noisy.mean == pytest.approx(0, abs=1e-6)
    assert noisy.low < 0 < noisy.high


def test_windows_are_taken_in_steps_and_too_few_are_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_moe_checkpoint(tmp_path / "model"))
    (tmp_path / "words.txt").write_text("alpha beta gamma <|endoftext|>\n" * 2000)
    every_WT = Windows("words.txt", 0, 9).read(checkpoint, tmp_path)
    assert every_WT.shape == (9, 512)
    assert Windows("words.txt", 2, 3, 2).read(checkpoint, tmp_path).equal(every_WT[2:8:2])
    with pytest.raises(CameraError, match="too few"):
        Windows("words.txt", 0, 10_000).read(checkpoint, tmp_path)
    with pytest.raises(CameraError, match="is absent"):
        Windows("other.txt", 0, 1).read(checkpoint, tmp_path)


def test_an_importance_is_averaged_over_the_tokens_of_its_own_expert() -> None:
    scores_F = torch.tensor([6.0, 12.0], dtype=torch.float64)
    statistics = {f"experts.{tokens}": BlockStatistics.zeros(2) for tokens in (0, 1, 3)}
    for tokens in (0, 1, 3):
        statistics[f"experts.{tokens}"].tokens = tokens
    found = averaged(dict.fromkeys(statistics, scores_F), statistics)
    assert [found[f"experts.{tokens}"].tolist() for tokens in (0, 1, 3)] == [[6, 12], [6, 12], [2, 4]]


def test_averaging_masks_as_many_channels_and_others(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_moe_checkpoint(tmp_path / "model", "deepseek_v2"))
    how = CaptureOptions(propagate="one-shot", device="cpu", dtype="float32")
    options = PruneOptions.model_validate({"ratio": 0.4, "multiple_of": 1, **WAYS[JOINT].options})
    windows_WT = random_windows(3, 32)
    prune_checkpoint(checkpoint, windows_WT, tmp_path / "summed", how, options)
    said = prune_averaged(checkpoint, windows_WT, tmp_path / "averaged", how, options)
    masks = [masked_columns(tmp_path / name) for name in ("summed", "averaged")]
    summed_C, averaged_C = masks
    assert summed_C.sum() == averaged_C.sum() > 0
    assert not summed_C.equal(averaged_C)
    routed, shared = (said["gone"][kind] * share for kind, share in (("routed", 0.8), ("shared", 0.2)))
    assert routed + shared == pytest.approx(380 / 960)  # 58 of 96 channels stay, or as many of a layer's 960


def masked_columns(folder: Path) -> torch.Tensor:
    """Of every down projection, one after the other, which columns are zero."""
    tensors = {
        name: tensor for file in folder.glob("*.safetensors") for name, tensor in read_tensors(file).items()
    }
    return torch.cat([(tensors[name] == 0).all(0) for name in sorted(tensors) if ".down_proj" in name])


def test_goals_are_met_where_the_mean_is_not_above_what_is_allowed() -> None:
    rows = [row(OURS, 0.4, 10, 12), row(JOINT, 0.4, 10.1, 12.1), row(WHOLE, 0.4, 9.9, 11.9)]
    rows += [row(OURS, 0.2, 10.2, 12.2), row(JOINT, 0.2, 10.15, 12.15)]
    assert [line[-1] for line in goals(rows)] == ["met", "MISSED", "met"]
    assert [line[-1] for line in goals(rows[:3])] == ["met", "MISSED"]
