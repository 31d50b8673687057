"""Importance scoring: from statistics and down projections to one score per micro-expert."""

from pathlib import Path

import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import read_tensors, write_tensors
from camera.errors import CameraError
from camera.files import write_json
from camera.layerwise.statistics import read_statistics
from camera.progress import Progress, silent
from camera.pruning.capture import STATISTICS
from camera.pruning.importance import importance

SCORES = "scores.safetensors"


def score(
    checkpoint: Checkpoint, captured: Path, out: Path, reduce_ratio: float, progress: Progress = silent
) -> None:
    """Write `scores.safetensors` (`layers.N.importance`, float64 [F]) and `scores.json` into the folder `out`.

    Args:
        checkpoint: the model whose statistics were captured.
        captured: the folder that capture wrote.
        out: an existing folder.
        reduce_ratio: CAMERA's α.
        progress: told (layers done, all).

    Raises:
        CameraError: if the statistics are those of another model, or a score is not finite.
    """
    count = checkpoint.layer_count
    scores: list[torch.Tensor] = []
    for index, statistics in enumerate(read_statistics(captured / STATISTICS, count)):
        down_name = checkpoint.family.ffn_names(index)[2]
        down_HF = checkpoint.read_finite(down_name)
        if down_HF.shape[1] != len(statistics.sum_squares_F):
            raise CameraError(
                f"{captured}: layer {index} has statistics of {len(statistics.sum_squares_F)} channels and "
                f"{down_name} has {down_HF.shape[1]}: capture again with this model"
            )
        scores_F = importance(statistics, down_HF, reduce_ratio)
        if not torch.isfinite(scores_F).all():
            raise CameraError(
                f"layer {index}: an importance is not finite; look at {down_name} for huge values"
            )
        scores.append(scores_F)
        progress(index + 1, count)
    write_scores(out, scores, reduce_ratio)


def write_scores(out: Path, scores: list[torch.Tensor], reduce_ratio: float) -> None:
    """Write the importance of every layer's channels, float64 [F], as `score` does."""
    points = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    summary = [
        {"layer": index, "sum": float(scores_F.sum()), "quartiles": torch.quantile(scores_F, points).tolist()}
        for index, scores_F in enumerate(scores)
    ]
    write_tensors(
        out / SCORES, {f"layers.{index}.importance": scores_F for index, scores_F in enumerate(scores)}
    )
    write_json(out / "scores.json", {"reduce_ratio": reduce_ratio, "layers": summary})


def read_scores(folder: Path, count: int) -> list[torch.Tensor]:
    """The scores of every layer, float64 [F], from a folder that `score` wrote.

    Raises:
        CameraError: if a layer is not there.
    """
    tensors = read_tensors(folder / SCORES)
    if len(tensors) != count:
        raise CameraError(f"{folder / SCORES} has {len(tensors)} layers, the model {count}: score this model")
    try:
        return [tensors[f"layers.{index}.importance"] for index in range(count)]
    except KeyError as error:
        raise CameraError(f"{folder / SCORES} has no {error}: score again with this model") from None
