import json
from pathlib import Path

import pytest
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.errors import CameraError
from camera.layerwise.statistics import BlockStatistics, write_statistics
from camera.pruning.folders import STATISTICS
from camera.pruning.stages import score
from tests.camera.pruning import naive
from tests.camera.pruning.conftest import PRUNE, Build, only_scores, run_steps


def statistics(layers: int, width: int, largest: float = 1.0) -> list[dict[str, BlockStatistics]]:
    return [
        {"": BlockStatistics(torch.full((width,), largest, dtype=torch.float64), torch.ones(width))}
        for _ in range(layers)
    ]


def test_scores_are_those_of_the_whole_model(build: Build, tokens: torch.Tensor, tmp_path: Path) -> None:
    folder = build(model_type="PanguEmbedded")
    steps = run_steps(folder, tokens, tmp_path, propagate="one-shot")
    model = Checkpoint.open(folder).load_model()
    for index, scores_F in enumerate(only_scores(steps.scored, 3)):
        assert scores_F.dtype == torch.float64
        down_HF = model.model.layers[index].mlp.down_proj.weight
        exact = naive.scores(naive.activations(model, tokens, index), down_HF, PRUNE.reduce_ratio)
        torch.testing.assert_close(scores_F.tolist(), exact, rtol=1e-4, atol=1e-10)


def test_the_summary_holds_the_sum_and_quartiles_of_every_layer(
    build: Build, tokens: torch.Tensor, tmp_path: Path
) -> None:
    steps = run_steps(build(model_type="llama"), tokens, tmp_path)
    summary = json.loads((steps.scored / "scores.json").read_text())
    assert summary["reduce_ratio"] == PRUNE.reduce_ratio
    for index, (row, scores_F) in enumerate(
        zip(summary["layers"], only_scores(steps.scored, 3), strict=True)
    ):
        assert row["layer"] == index
        assert row["sum"] == pytest.approx(float(scores_F.sum()))
        assert row["quartiles"][0] == float(scores_F.min())
        assert row["quartiles"][2] == pytest.approx(float(scores_F.quantile(0.5)))
        assert row["quartiles"][4] == float(scores_F.max())


def test_statistics_of_a_model_of_another_width_are_refused(build: Build, tmp_path: Path) -> None:
    write_statistics(tmp_path / STATISTICS, statistics(3, 172))
    with pytest.raises(CameraError, match=r"has statistics of 172 channels .*down_proj\.weight has 192"):
        score(Checkpoint.open(build(model_type="llama")), tmp_path, tmp_path, 0.5)


@pytest.mark.parametrize("layers", [2, 4])
def test_statistics_of_a_model_with_other_layers_are_refused(
    build: Build, tmp_path: Path, layers: int
) -> None:
    write_statistics(tmp_path / STATISTICS, statistics(layers, 192))
    with pytest.raises(CameraError, match=rf"has sum_squares of {layers} layers, the model 3"):
        score(Checkpoint.open(build(model_type="llama")), tmp_path, tmp_path, 0.5)


def test_a_folder_without_statistics_is_refused(build: Build, tmp_path: Path) -> None:
    with pytest.raises(CameraError, match=rf"{STATISTICS} is missing"):
        score(Checkpoint.open(build(model_type="llama")), tmp_path, tmp_path, 0.5)


def test_an_importance_beyond_float64_is_refused_with_its_layer(build: Build, tmp_path: Path) -> None:
    write_statistics(tmp_path / STATISTICS, statistics(3, 192, largest=1.7e308))
    with pytest.raises(CameraError, match=r"an importance is not finite; .*down_proj"):
        score(Checkpoint.open(build(model_type="llama", hidden=128)), tmp_path, tmp_path, 0.0)


def test_a_folder_without_scores_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CameraError, match=r"scores\.safetensors is missing"):
        only_scores(tmp_path, 3)


def test_another_reduce_ratio_than_capture_decided_with_is_refused(
    build: Build, tokens: torch.Tensor, tmp_path: Path
) -> None:
    folder = build(model_type="llama")
    steps = run_steps(folder, tokens, tmp_path, propagate="sequential")
    with pytest.raises(
        CameraError, match=r"chose its channels with reduce-ratio 0\.6, and 0\.5 is asked for"
    ):
        score(Checkpoint.open(folder), steps.captured, steps.scored, 0.5)
