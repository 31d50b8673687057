"""From a checkpoint to a pruned checkpoint in one run: capture, score, prune and save, a layer at a time.

Memory is about one decoder layer and the hidden states, whatever the model's size, and the source is read once. Each
layer is written as soon as it is decided; a killed run goes on at the layer it was in, in the same shards, and ends with
the bytes of an undisturbed one.
"""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.devices import resolve_device, resolve_dtype
from camera.digests import digest_file
from camera.disk import explain_disk_errors
from camera.errors import MISREAD, CameraError
from camera.files import move_into_place, read_json, refuse_occupied, remove_stale_temporaries, write_json
from camera.held import holding, note
from camera.layerwise.resume import clear_states
from camera.locks import output_lock
from camera.options import CaptureOptions, PruneOptions
from camera.progress import Progress, silent
from camera.pruning.decision import Decision, records_of
from camera.pruning.execute import decide, fingerprint
from camera.pruning.folders import Scored, write_captured, write_kept
from camera.pruning.model_writer import ModelWriter
from camera.pruning.plan import PrunePlan, plan_prune
from camera.pruning.sink import model_sink
from camera.pruning.split import SPLIT, split_by_pass
from camera.pruning.summary import write_summary

_WORK = ".work"
_BEGUN = "begun.json"
_WRITTEN = "written.json"
_log = logging.getLogger(__name__)


def prune_checkpoint(
    checkpoint: Checkpoint,
    tokens_ST: torch.Tensor,
    out: Path,
    capture: CaptureOptions,
    options: PruneOptions,
    progress: Progress = silent,
    finish: Callable[[Path, Path], None] = lambda model, pruned: None,
) -> None:
    """Write the pruned model to `out`, which must not exist with content.

    The same channels and bytes as capture, score, prune and save one after the other. The unfinished model lies
    beside `out` as `.<name>.partial`; the same call on the same inputs goes on there.

    Args:
        checkpoint: the source.
        tokens_ST: int64 [samples, tokens] of calibration text.
        out: the folder to make.
        capture: propagation, batch size, dtype, device, over how many devices.
        options: which channels go, and what becomes of the weights of those that stay.
        progress: told (samples done × layers, all).
        finish: called with the finished model, which is not in its place yet, and a folder with what capture, score and
            prune write, which is removed after: the moment to add a card.

    Raises:
        CameraError: as `camera.pruning.execute.decide`; if nothing would be pruned; or if `out` is occupied, or another
            process is making it.
    """
    plan = plan_prune(checkpoint, capture, options)
    steady = note(checkpoint.folder, checkpoint.files)
    with output_lock(out), explain_disk_errors(out.parent), holding(steady):
        refuse_occupied(out)
        partial = unfinished(out)
        work = partial / _WORK
        asked = _asked(checkpoint, tokens_ST, capture, plan)
        resume = _begun_for(work, asked)
        if not resume:
            shutil.rmtree(partial, ignore_errors=True)
            work.mkdir(parents=True)
        chosen = split_by_pass(checkpoint, tokens_ST, plan, capture, work, progress)
        writer = _open_writer(checkpoint, chosen, partial, resume=resume)
        if resume and not _is_as_written(work, writer):
            writer.abandon()
            _log.warning("%s: what an earlier run left is damaged: begun again", partial)
            shutil.rmtree(partial)
            work.mkdir(parents=True)
            chosen = split_by_pass(checkpoint, tokens_ST, plan, capture, work, progress)
            writer = _open_writer(checkpoint, chosen, partial, resume=False)

        def durable() -> None:  # not before, so that what can be resumed has all its shards
            layers = {str(layer): writer.digest(layer) for layer in writer.durable}
            write_json(work / _WRITTEN, {"split": _digest(work / SPLIT), "layers": layers})
            if not (work / _BEGUN).is_file():
                write_json(work / _BEGUN, asked)

        sink = model_sink(writer, durable, resolve_device(capture.device))
        decisions: list[Decision] = []
        try:
            if chosen is not plan:
                sink.sync()  # that pass is not to be made again
            for decision in decide(checkpoint, tokens_ST, chosen, capture, work, sink, progress):
                sink.take(decision)
                decisions.append(decision.without_matrices())
                del decision
            sink.finish()
        finally:
            sink.close()
        steady.check()
        plan = chosen
        write_captured(work, checkpoint, tokens_ST, capture, decisions)
        scored, layers = Scored.of(decisions), [decision.stays() for decision in decisions]
        scored.write(work, plan.reduce_ratio)
        write_kept(work, layers)
        write_summary(work, checkpoint, plan, options, scored, (layers, records_of(decisions)))
        finish(partial, work)
        clear_states(work)
        shutil.rmtree(work)
        move_into_place(partial, out)


def unfinished(out: Path) -> Path:
    """Where the model lies that is to become `out`."""
    return out.with_name(f".{out.name}.partial")


def _open_writer(checkpoint: Checkpoint, plan: PrunePlan, partial: Path, *, resume: bool) -> ModelWriter:
    """The writer of a model; it goes on in the shards that are there if `resume`."""
    for folder in (
        partial,
        partial / _WORK,
    ):  # a kill may have come while config, index or state were written
        remove_stale_temporaries(folder, exclusive=True)
    changes = plan.config_changes(checkpoint) if plan.mode == "physical" else {}
    return ModelWriter(checkpoint, partial, plan.mode, changes, changed=plan.changes, resume=resume)


def _asked(
    checkpoint: Checkpoint, tokens_ST: torch.Tensor, capture: CaptureOptions, plan: PrunePlan
) -> dict[str, Any]:
    """What an unfinished folder belongs to."""
    dtype = resolve_dtype(capture.dtype, checkpoint.dtype)
    return {
        "inputs": fingerprint(checkpoint, tokens_ST, dtype, plan),
        "capture": capture.identity(),
        "mode": plan.mode,
    }


def _is_as_written(work: Path, writer: ModelWriter) -> bool:
    """Whether the layers that an earlier run had written are still what it wrote."""
    try:
        layers = read_json(work / _WRITTEN)["layers"]
        return all(writer.digest(int(layer)) == digest for layer, digest in layers.items())
    except (CameraError, *MISREAD):
        return False


def _begun_for(work: Path, asked: dict[str, Any]) -> bool:
    try:
        if not (work / _BEGUN).is_file() or read_json(work / _BEGUN) != asked:
            return False
        return bool(read_json(work / _WRITTEN)["split"] == _digest(work / SPLIT))
    except (CameraError, *MISREAD):
        return False  # damaged: begin again


def _digest(path: Path) -> str | None:
    return digest_file(path) if path.is_file() else None
