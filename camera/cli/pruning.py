"""From a checkpoint to a pruned checkpoint: capture, score, prune, save. Paths in, paths out; no orchestrator, no store."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from camera.cli.options import Flags
from camera.cli.output import progress_bar, say
from camera.cli.parameters import Model, Out

if TYPE_CHECKING:
    from camera.options import CalibrationOptions, CaptureOptions, PruneOptions


def capture(
    model: Model,
    out: Out,
    calibration: "CalibrationOptions",
    options: Annotated["CaptureOptions", Flags(propagate="one-shot")],
    widths: Annotated["PruneOptions", Flags("ratio", "reduce_ratio", "multiple_of")],
) -> None:
    """Measure the activations of every FFN channel.

    One-shot statistics serve every ratio. In sequential mode they hold for one --ratio, --reduce-ratio and
    --multiple-of.

    Example: `camera capture MODEL stats --calibration text.txt --samples 64 --length 512`
    """
    from camera.checkpoints.checkpoint import Checkpoint
    from camera.data import calibration_windows
    from camera.files import atomic_folder
    from camera.pruning.plan import plan_prune
    from camera.pruning.stages import capture as run

    checkpoint = Checkpoint.open(model)
    checkpoint.check_shapes()
    plan = plan_prune(checkpoint, options, widths) if options.propagate == "sequential" else None
    tokens_ST = calibration_windows(calibration, checkpoint)
    with atomic_folder(out) as folder, progress_bar("capture") as progress:
        run(checkpoint, tokens_ST, folder, options, plan, progress)
    say(f"statistics of {tokens_ST.numel()} tokens: {out}")


def score(
    model: Model,
    captured: Annotated[Path, typer.Argument(help="Folder that `camera capture` wrote.", show_default=False)],
    out: Out,
    options: Annotated["PruneOptions", Flags("reduce_ratio")],
) -> None:
    """Turn statistics into one importance per FFN channel.

    Example: `camera score MODEL stats scores --reduce-ratio 0.95`
    """
    from camera.checkpoints.checkpoint import Checkpoint
    from camera.files import atomic_folder
    from camera.pruning.stages import score as run

    with atomic_folder(out) as folder, progress_bar("score") as progress:
        run(Checkpoint.open(model), captured, folder, options.reduce_ratio, progress)
    say(f"scores: {out}")


def prune(
    model: Model,
    out: Out,
    options: "PruneOptions",
    capture: "CaptureOptions",
    calibration: "CalibrationOptions | None" = None,
    scores: Annotated[
        Path | None,
        typer.Option(help="Instead of --calibration: a folder of `camera score`. `camera save` is next."),
    ] = None,
) -> None:
    """Remove the least important FFN channels: capture, score, prune and save in one go.

    OUT is a standard Hugging Face folder. With --scores only the prune stage runs. --method obs loses least, at up
    to twice the time.

    Examples: `camera prune openPangu-7B out --calibration text.jsonl --ratio 0.2 --reduce-ratio 0.95`

    `camera prune openPangu-7B out --calibration text.jsonl --ratio 0.4 --method obs`
    """
    from camera.checkpoints.checkpoint import Checkpoint
    from camera.cli.capture_to_save import capture_to_save
    from camera.errors import CameraError
    from camera.files import atomic_folder
    from camera.pruning.plan import plan_prune
    from camera.pruning.stages import prune as run

    if (calibration is None) == (scores is None):
        raise CameraError(
            "give either --calibration (to go from capture to save) or --scores (to prune alone)"
        )
    if scores is not None and (options.method != "camera" or options.sparsity):
        raise CameraError(
            f"--method {options.method} and --sparsity need the activations: give --calibration, not --scores"
            if options.method != "camera"
            else "--sparsity needs the activations: give --calibration, not --scores"
        )
    checkpoint = Checkpoint.open(model)
    checkpoint.check_shapes()
    if calibration is not None:
        capture_to_save(checkpoint, out, calibration, capture, options)
        return
    assert scores is not None
    with atomic_folder(out) as folder:
        run(checkpoint, scores, folder, plan_prune(checkpoint, capture, options), options)
    say(f"kept channels: {out}")


def save(
    model: Model,
    pruned: Annotated[Path, typer.Argument(help="Folder of `camera prune --scores`.", show_default=False)],
    out: Out,
) -> None:
    """Write the pruned model as a standard Hugging Face folder, and compare what was written.

    Example: `camera save MODEL pruned out`
    """
    from camera.checkpoints.checkpoint import Checkpoint
    from camera.files import atomic_folder
    from camera.pruning.stages import save as run
    from camera.report.card import write_card

    checkpoint = Checkpoint.open(model)
    with atomic_folder(out) as folder, progress_bar("save") as progress:
        run(checkpoint, pruned, folder, progress)
        write_card(folder, checkpoint, pruned, base_model=model.name)
    say(f"model: {out}")
