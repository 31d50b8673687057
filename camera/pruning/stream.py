"""From a checkpoint to a pruned checkpoint in one walk: capture, score, prune and save, a layer at a time.

Memory is about one decoder layer and the hidden states, whatever the model's size, and the source is read once. Each
layer is written as soon as its channels are selected; a killed run goes on at the layer it was in, in the same
shards, and ends with the bytes of an undisturbed one. Pruning in several steps is so many walks, each through the
model that the one before wrote.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.devices import resolve_dtype
from camera.disk import told_of_disks
from camera.errors import CameraError
from camera.files import held, read_json, refuse_occupied, sync, sync_tree, write_json
from camera.layerwise.resume import clear_states
from camera.options import CaptureOptions, PruneOptions
from camera.progress import Progress, silent
from camera.pruning.decisions import Decision, decide
from camera.pruning.importance import kept_width
from camera.pruning.outcome import FILES, Outcome
from camera.pruning.propagate import fingerprint
from camera.pruning.prune import pruned_matrix
from camera.pruning.target import PrunedTarget
from camera.pruning.widths import CURVES, Widths, measured, measures, uniform
from camera.temporaries import sweep

WORK = ".work"
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
        options: which channels go, and what becomes of the weights of those that stay.
        progress: told (samples done × layers, all), all steps together.
        finish: called with the finished model, which is not in its place yet, and the folder with
            `kept.safetensors` and `prune.json`, which is removed after: the moment to add a card.

    Raises:
        CameraError: as `propagate`; if nothing would be pruned; or if `out` is occupied, or
            another process is making it.
    """
    keep = kept_width(checkpoint.ffn_width, options.ratio, options.multiple_of)
    with held(out), told_of_disks(out.parent):
        _prune_checkpoint(checkpoint, tokens_ST, out, capture, options, keep, progress, finish)


def layer_widths(
    checkpoint: Checkpoint,
    tokens_ST: torch.Tensor,
    folder: Path,
    capture: CaptureOptions,
    options: PruneOptions,
    keep: int,
    progress: Progress = silent,
) -> Widths:
    """The widths that options ask for: `keep` for all, or measured ones.

    Args:
        checkpoint: the source model.
        tokens_ST: int64 [samples, tokens].
        folder: for what is measured, made if it is needed; what was measured for the same question is used again.
        capture: batch size, dtype, device. Damage is that of one-shot pruning, whatever is asked for in the end.
        options: how to choose.
        keep: FFN channels of one width for all.
        progress: as for `widths.measured`.
    """
    if not measures(checkpoint, options):
        return uniform(checkpoint, keep)
    asked = asked_for(checkpoint, tokens_ST, capture, options)
    if not resumable(folder, asked):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        begin(folder, asked)
    dense_below = capture.model_copy(update={"propagate": "one-shot"})
    one_width = options.model_copy(
        update={
            "allocation": "uniform",
            "mode": "physical",
            "sparsity": 0.0,
            "sparsity_pattern": "unstructured",
        }
    )

    def cut_at(width: int, model: Path, tell: Progress) -> None:
        _prune_checkpoint(checkpoint, tokens_ST, model, dense_below, one_width, width, tell, _nothing_more)

    return measured(checkpoint, tokens_ST, folder, capture, options, cut_at, progress)


def after(widths: Widths, progress: Progress) -> Progress:
    """Of the walk that follows the measuring ones."""
    walks = widths.walks
    return lambda done, total: progress(walks * total + done, (walks + 1) * total)


def unfinished(out: Path) -> Path:
    """Where the model lies that is to become `out`."""
    return out.with_name(f".{out.name}.partial")


def _prune_checkpoint(
    checkpoint: Checkpoint,
    tokens_ST: torch.Tensor,
    out: Path,
    capture: CaptureOptions,
    options: PruneOptions,
    keep: int,
    progress: Progress,
    finish: Callable[[Path, Path], None],
) -> None:
    refuse_occupied(out)
    changes(checkpoint, options, (keep, *measures(checkpoint, options)))  # refuses before anything is done
    partial = unfinished(out)
    work, curves = partial / WORK, partial / CURVES
    asked = asked_for(checkpoint, tokens_ST, capture, options)
    resume = resumable(work, asked)
    if not resume:
        _clear_but(partial, curves)
        work.mkdir(parents=True)
    widths = layer_widths(checkpoint, tokens_ST, curves, capture, options, keep, progress)
    progress = after(widths, progress)
    changed = changes(checkpoint, options, widths.layers)
    sweep(partial, alone=True)  # a kill may also have come while config or index were written
    target = PrunedTarget(checkpoint, partial, widths.widest, options.mode, changed=changed, resume=resume)
    if not resume:  # only now, so that what can be resumed has all its shards
        target.sync()
        begin(work, asked)

    def write(decision: Decision, kept_K: torch.Tensor) -> None:
        if decision.resumed:
            target.already_written(decision.layer)
        elif changed:

            def matrix(name: str) -> torch.Tensor:
                own = decision.matrices.get(name)
                return pruned_matrix(
                    checkpoint, decision.layer, name, kept_K, options.mode, own, widths.widest
                )

            target.write_layer(decision.layer, matrix)

    try:
        outcome = prune_layers(
            checkpoint, tokens_ST, work, capture, options, widths.layers, write, target.sync, progress
        )
        target.write_rest()
        target.finish()
    finally:
        target.abandon()
    outcome.write(work, checkpoint, tokens_ST, capture, options, widths)
    finish(partial, work)
    clear_states(work)
    shutil.rmtree(curves, ignore_errors=True)
    shutil.rmtree(work)
    sync_tree(partial)
    if out.exists():
        out.rmdir()
    partial.rename(out)
    sync(out.parent)


def prune_layers(
    checkpoint: Checkpoint,
    tokens_ST: torch.Tensor,
    work: Path,
    capture: CaptureOptions,
    options: PruneOptions,
    widths: tuple[int, ...],
    write: Callable[[Decision, torch.Tensor], None],
    before_saving: Callable[[], None],
    progress: Progress,
) -> Outcome:
    """Decide layer by layer, in as many steps as the options say, and have the last step's layers written.

    Args:
        checkpoint: the source model.
        tokens_ST: int64 [samples, tokens].
        work: an existing folder for state, notes, and the models of earlier steps.
        capture: how to walk.
        options: how to choose.
        widths: FFN channels of each layer that stay in the end; in several steps they are one width.
        write: given a layer's decision, and the channels that stay in the source model's numbers.
        before_saving: makes durable what was written.
        progress: told (samples done × layers, all).
    """
    walked, earlier = checkpoint, None
    removed = checkpoint.ffn_width - max(widths)
    steps = min(options.steps, max(removed, 1))

    def of_step(step: int) -> Progress:
        return lambda done, total: progress((step - 1) * total + done, steps * total)

    for step in range(1, steps):
        model, notes = work / f"step-{step}", work / f"step-{step}-notes"
        width = checkpoint.ffn_width - removed * step // steps
        if not any((work / f"step-{later}").is_dir() for later in range(step, steps)):
            _prune_step(walked, tokens_ST, model, notes, capture, options, width, of_step(step))
        earlier = _joined(earlier, Outcome.read(notes), step)
        if model.is_dir():
            walked = Checkpoint.open(model)
            shutil.rmtree(work / f"step-{step - 1}", ignore_errors=True)
    outcome = Outcome() if earlier is None else Outcome(cuts=[*earlier.cuts])
    for decision in decide(walked, tokens_ST, work, capture, options, widths, before_saving, of_step(steps)):
        if earlier is not None:
            decision = decision.of_slice(walked)
        write(decision, outcome.add(decision, earlier, steps))
    return outcome


def _prune_step(
    walked: Checkpoint,
    tokens_ST: torch.Tensor,
    model: Path,
    notes: Path,
    capture: CaptureOptions,
    options: PruneOptions,
    width: int,
    progress: Progress,
) -> None:
    """Write the model of a step that is not the last, and what was decided in it."""

    def note(_: Path, decided: Path) -> None:
        notes.mkdir(exist_ok=True)
        for name in FILES:
            shutil.copyfile(decided / name, notes / name)
        sync_tree(notes)

    once = options.model_copy(
        update={"steps": 1, "mode": "physical", "sparsity": 0.0, "sparsity_pattern": "unstructured"}
    )
    _prune_checkpoint(walked, tokens_ST, model, capture, once, width, progress, note)


def changes(checkpoint: Checkpoint, options: PruneOptions, widths: tuple[int, ...]) -> bool:
    """Whether any matrix will be another than the source's.

    Raises:
        CameraError: for a 2:4 pattern where rows are not made of fours.
    """
    odd = [
        f"{size} {what}"
        for what, size in (
            *(("kept FFN channels", width) for width in widths),
            ("hidden", checkpoint.hidden_size),
        )
        if size % 4
    ]
    if options.sparsity_pattern == "2:4" and odd:
        raise CameraError(f"prune.sparsity_pattern 2:4 needs rows of a multiple of 4: {odd[0]} are none")
    return min(widths) < checkpoint.ffn_width or options.sparsity > 0


def _clear_but(folder: Path, kept: Path) -> None:
    """Remove what is in a folder, but for one folder in it."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.is_dir() and path != kept:
            shutil.rmtree(path)
        elif path != kept:
            path.unlink()


def _joined(earlier: Outcome | None, latest: Outcome, step: int) -> Outcome:
    """Two steps as one, in the source model's channels."""
    cuts = [{**cut, "step": step} for cut in latest.cuts]
    if earlier is None:
        return Outcome(latest.kept, latest.scores, latest.statistics, cuts)
    kept = [of_source[of_step] for of_source, of_step in zip(earlier.kept, latest.kept, strict=True)]
    return Outcome(kept, earlier.scores, earlier.statistics, [*earlier.cuts, *cuts])


def asked_for(
    checkpoint: Checkpoint, tokens_ST: torch.Tensor, capture: CaptureOptions, options: PruneOptions
) -> dict[str, Any]:
    """What an unfinished folder belongs to."""
    dtype = resolve_dtype(capture.dtype, checkpoint.dtype)
    return {
        "inputs": fingerprint(checkpoint, tokens_ST, dtype, None),
        "capture": capture.model_dump(mode="json", exclude={"batch_size", "devices"}),
        "prune": options.identity(),
    }


def resumable(work: Path, asked: dict[str, Any]) -> bool:
    """Whether the working folder was begun for what is asked for; swept then of what a kill left half written."""
    try:
        if (work / _BEGUN).is_file() and read_json(work / _BEGUN) == asked:
            sweep(work, alone=True)
            return True
    except CameraError:
        pass  # damaged: begin again
    return False


def begin(work: Path, asked: dict[str, Any]) -> None:
    """Note what a working folder is for."""
    write_json(work / _BEGUN, asked)
