"""Prune where statistics made beforehand are not enough: the walk decides, and the matrices are written as it goes.

The folder holds what `prune` writes, and beside it what `capture` and `score` would have written.
"""

import shutil
from pathlib import Path

import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import write_tensors
from camera.files import whole_file
from camera.options import CaptureOptions, PruneOptions
from camera.progress import Progress, silent
from camera.pruning.decisions import Decision
from camera.pruning.importance import kept_width
from camera.pruning.prune import layer_file, pruned_matrix
from camera.pruning.stream import (
    WORK,
    after,
    asked_for,
    begin,
    changes,
    layer_widths,
    prune_layers,
    resumable,
)
from camera.pruning.widths import CURVES, measures


def prune_by_walk(
    checkpoint: Checkpoint,
    tokens_ST: torch.Tensor,
    out: Path,
    capture: CaptureOptions,
    options: PruneOptions,
    progress: Progress = silent,
) -> None:
    """Write `outcome.FILES` and one file of changed matrices per layer into the folder `out`.

    A killed walk goes on at the layer it was in.

    Args:
        checkpoint: the model.
        tokens_ST: int64 [samples, tokens] of calibration text.
        out: an existing folder.
        capture: how to walk.
        options: which channels go, and what becomes of the weights of those that stay.
        progress: told (samples done × layers, all), all steps together.

    Raises:
        CameraError: as `propagate`, or if nothing would be pruned.
    """
    keep = kept_width(checkpoint.ffn_width, options.ratio, options.multiple_of)
    changes(checkpoint, options, (keep, *measures(checkpoint, options)))  # refuses before anything is done
    work, curves = out / WORK, out / CURVES
    asked = asked_for(checkpoint, tokens_ST, capture, options)
    if not resumable(work, asked):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        begin(work, asked)

    widths = layer_widths(checkpoint, tokens_ST, curves, capture, options, keep, progress)
    changed = changes(checkpoint, options, widths.layers)

    def write(decision: Decision, kept_K: torch.Tensor) -> None:
        if decision.resumed or not changed:
            return
        with whole_file(out / layer_file(decision.layer)) as temporary:
            write_tensors(
                temporary,
                {
                    name: pruned_matrix(
                        checkpoint,
                        decision.layer,
                        name,
                        kept_K,
                        options.mode,
                        decision.matrices.get(name),
                        widths.widest,
                    )
                    for name in checkpoint.family.ffn_names(decision.layer)
                },
            )

    # Each layer's file is durable when it is in its place.
    walking = after(widths, progress)
    outcome = prune_layers(
        checkpoint, tokens_ST, work, capture, options, widths.layers, write, lambda: None, walking
    )
    outcome.write(out, checkpoint, tokens_ST, capture, options, widths)
    shutil.rmtree(curves, ignore_errors=True)
    shutil.rmtree(work)
