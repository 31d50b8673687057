"""The widths of the layers of a model that is to be pruned: one for all, or by what cutting each layer was measured to cost."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.errors import CameraError
from camera.files import read_json, write_json
from camera.options import CaptureOptions, PruneOptions
from camera.progress import Progress, silent
from camera.pruning.allocation import allocate, bounds, measured_at
from camera.pruning.importance import kept_width
from camera.pruning.layer_loss import layer_losses

CURVES = ".curves"
"""Folder in an unfinished one where measured curves are kept."""


@dataclass(frozen=True)
class Widths:
    """What every layer keeps."""

    layers: tuple[int, ...]
    """FFN channels of each layer."""
    walks: int = 0
    """Walks through the model that measuring takes."""
    record: dict[str, Any] | None = None
    """What was measured, for `prune.json`; None for one width."""

    @property
    def widest(self) -> int:
        """The width that all are padded to."""
        return max(self.layers)


def uniform(checkpoint: Checkpoint, keep: int) -> Widths:
    """One width for all layers."""
    return Widths((keep,) * checkpoint.layer_count)


def measures(checkpoint: Checkpoint, options: PruneOptions) -> list[int]:
    """The widths at which every layer's damage is measured; none where all layers get one width."""
    if options.allocation == "uniform" or options.ratio == 0:
        return []
    width = checkpoint.ffn_width
    keep = kept_width(width, options.ratio, options.multiple_of)
    return measured_at(width, keep, options.allocation_bound, options.multiple_of)


def widest_possible(checkpoint: Checkpoint, options: PruneOptions) -> int:
    """The width that a model's layers are padded to at most, in physical mode."""
    keep = kept_width(checkpoint.ffn_width, options.ratio, options.multiple_of)
    if not measures(checkpoint, options):
        return keep
    return bounds(checkpoint.ffn_width, keep, options.allocation_bound, options.multiple_of)[1]


def measured(
    checkpoint: Checkpoint,
    tokens_ST: torch.Tensor,
    folder: Path,
    capture: CaptureOptions,
    options: PruneOptions,
    cut_at: Callable[[int, Path, Progress], None],
    progress: Progress = silent,
) -> Widths:
    """Measure the damage of each layer at several widths, and spread the channels by it.

    Args:
        checkpoint: the source model.
        tokens_ST: int64 [samples, tokens] of calibration text.
        folder: keeps what was measured; a killed call goes on behind it.
        capture: batch size, dtype, device.
        options: how many channels in all, within which bound, in which multiples.
        cut_at: makes the model whose layers are all cut to a width, each as if the others were whole.
        progress: told (samples done × layers, all), over all of its walks and one that follows.

    Raises:
        CameraError: as `layer_losses`, or where a kept curve is damaged.
    """
    points = measures(checkpoint, options)
    count = min(options.allocation_windows, len(tokens_ST))
    windows_WT = tokens_ST[torch.linspace(0, len(tokens_ST) - 1, count).round().long()]
    curves: list[dict[int, float]] = [{} for _ in range(checkpoint.layer_count)]
    for number, width in enumerate(points):
        path, model = folder / f"curve-{width}.json", folder / f"at-{width}"

        def tell(done: int, total: int, number: int = number) -> None:
            progress(number * total + done, (len(points) + 1) * total)

        if not path.is_file():
            if not model.is_dir():
                cut_at(width, model, tell)
            losses = layer_losses(checkpoint, Checkpoint.open(model), windows_WT, capture)
            write_json(path, {"losses": losses})
        shutil.rmtree(model, ignore_errors=True)
        for curve, loss in zip(curves, _read(path, checkpoint.layer_count), strict=True):
            curve[width] = loss
    keep = kept_width(checkpoint.ffn_width, options.ratio, options.multiple_of)
    layers = allocate(curves, checkpoint.ffn_width, keep, options.allocation_bound, options.multiple_of)
    record = {
        "uniform_width": keep,
        "widths": layers,
        "measured_widths": points,
        "measured_windows": count,
        "divergences": [[curve[width] for width in points] for curve in curves],
    }
    return Widths(tuple(layers), len(points), record)


def _read(path: Path, count: int) -> list[float]:
    try:
        losses = [float(loss) for loss in read_json(path)["losses"]]
    except (KeyError, TypeError, ValueError) as error:
        raise CameraError(f"{path} is damaged: remove it and run again ({error})") from None
    if len(losses) != count:
        raise CameraError(f"{path} is of a model of {len(losses)} layers: remove it and run again")
    return losses
