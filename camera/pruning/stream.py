"""From a checkpoint to a pruned checkpoint in one walk: capture, score, prune and save, a layer at a time.

Memory is about one decoder layer and the hidden states, whatever the model's size, and the source is read once. Each
layer is written as soon as its channels are selected; a killed run goes on at the layer it was in, in the same
shards, and ends with the bytes of an undisturbed one.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import write_tensors
from camera.devices import resolve_dtype
from camera.errors import CameraError
from camera.files import read_json, refuse_occupied, sweep, sync, sync_tree, write_json
from camera.options import CaptureOptions, PruneOptions
from camera.progress import Progress, silent
from camera.pruning.importance import importance, kept_channels, kept_width
from camera.pruning.propagate import Selection, Visit, fingerprint, propagate, selection_of
from camera.pruning.prune import KEPT, SUMMARY, pruned_matrix, share_kept, summarize
from camera.pruning.ranks import Ranks, ranks
from camera.pruning.state import clear_states
from camera.pruning.target import PrunedTarget

_WORK = ".work"
_BEGUN = "begun.json"


def _nothing_more(model: Path, pruned: Path) -> None:
    """The model is finished as it is."""


def prune_checkpoint(
    checkpoint: Checkpoint,
    tokens_ST: torch.Tensor,
    out: Path,
    capture: CaptureOptions,
    options: PruneOptions,
    progress: Progress = silent,
    finish: Callable[[Path, Path], None] = _nothing_more,
) -> None:
    """Write the pruned model to `out`, which must not exist with content.

    The same channels and bytes as capture, score, prune and save one after the other. The unfinished model lies
    beside `out` as `.<name>.partial`; the same call on the same inputs goes on there.

    Args:
        checkpoint: the source model.
        tokens_ST: int64 [samples, tokens] of calibration text.
        out: the folder to make.
        capture: how to walk: propagation, batch size, dtype, device, over how many devices.
        options: which channels go.
        progress: told (samples done × layers, all).
        finish: called with the finished model, which is not in its place yet, and the folder with
            `kept.safetensors` and `prune.json`, which is removed after: the moment to add a card.

    Raises:
        CameraError: as `propagate`; if nothing would be pruned; or if `out` is occupied.
    """
    refuse_occupied(out)
    keep = kept_width(checkpoint.ffn_width, options.ratio, options.multiple_of)
    selection = selection_of(checkpoint, capture, options)
    partial = out.with_name(f".{out.name}.partial")
    asked = _asked(checkpoint, tokens_ST, capture, options)
    resume = _find(partial, asked)
    work = partial / _WORK
    target = PrunedTarget(checkpoint, partial, keep, options.mode, resume=resume)
    if not resume:  # only now, so that what can be resumed has all its shards
        target.sync()
        write_json(work / _BEGUN, asked)
    kept: list[torch.Tensor] = []
    shares: list[float] = []
    arguments = (checkpoint.folder, tokens_ST, work, capture, selection)
    try:
        with ranks(capture.devices, _help, *arguments) as us:
            for visit in propagate(
                checkpoint,
                tokens_ST,
                capture,
                selection,
                work,
                ranks=us,
                before_saving=target.sync,
                progress=progress,
            ):
                scores_F = _scores(checkpoint, visit, options.reduce_ratio)
                kept_K = kept_channels(scores_F, keep)
                kept.append(kept_K)
                shares.append(share_kept(scores_F, kept_K))
                if visit.resumed:
                    target.already_written(visit.layer)
                elif keep < checkpoint.ffn_width:

                    def matrix(
                        name: str, layer: int = visit.layer, kept_K: torch.Tensor = kept_K
                    ) -> torch.Tensor:
                        return pruned_matrix(checkpoint, layer, name, kept_K, options.mode)

                    target.write_layer(visit.layer, matrix)
        target.write_rest()
        target.finish()
    finally:
        target.abandon()
    write_tensors(work / KEPT, {f"layers.{index}.kept": kept_K for index, kept_K in enumerate(kept)})
    write_json(work / SUMMARY, summarize(checkpoint, options, shares))
    finish(partial, work)
    clear_states(work)
    shutil.rmtree(work)
    sync_tree(partial)
    if out.exists():
        out.rmdir()
    partial.rename(out)
    sync(out.parent)


def _asked(
    checkpoint: Checkpoint, tokens_ST: torch.Tensor, capture: CaptureOptions, options: PruneOptions
) -> dict[str, Any]:
    """What an unfinished folder belongs to."""
    dtype = resolve_dtype(capture.dtype, checkpoint.dtype)
    return {
        "inputs": fingerprint(checkpoint, tokens_ST, dtype, selection_of(checkpoint, capture, options)),
        "capture": capture.model_dump(mode="json", exclude={"batch_size", "devices"}),
        "prune": options.model_dump(mode="json"),
    }


def _find(partial: Path, asked: dict[str, Any]) -> bool:
    """Whether the unfinished folder was begun with the same inputs and can be resumed; else make it anew."""
    begun = partial / _WORK / _BEGUN
    try:
        if begun.is_file() and read_json(begun) == asked:
            sweep(partial)  # a kill may also have come while config or index were written
            sweep(partial / _WORK)
            return True
    except CameraError:
        pass  # damaged: begin again
    shutil.rmtree(partial, ignore_errors=True)
    (partial / _WORK).mkdir(parents=True)
    return False


def _scores(checkpoint: Checkpoint, visit: Visit, reduce_ratio: float) -> torch.Tensor:
    down_HF = checkpoint.read_finite(checkpoint.family.ffn_names(visit.layer)[2])
    return importance(visit.statistics, down_HF, reduce_ratio)


def _help(
    us: Ranks,
    folder: Path,
    tokens_ST: torch.Tensor,
    work: Path,
    capture: CaptureOptions,
    selection: Selection | None,
) -> None:
    """What the other ranks do: the same walk over their samples."""
    for _ in propagate(Checkpoint.open(folder), tokens_ST, capture, selection, work, ranks=us):
        pass
