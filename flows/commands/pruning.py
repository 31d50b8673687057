"""From a checkpoint to a pruned checkpoint: capture, score, prune, save. Paths in, paths out; no orchestrator, no store."""

from pathlib import Path
from typing import Annotated

import typer

from flows.commands.common import checked, dataset, progress_bar, say
from flows.commands.flags import (
    Allocation,
    BatchSize,
    Calibration,
    Device,
    DType,
    DTypeOption,
    Length,
    Mode,
    Model,
    MultipleOf,
    NProc,
    Out,
    Pattern,
    Propagate,
    PropagateOption,
    Ratio,
    ReduceRatio,
    Samples,
    Score,
    Seed,
)


def capture(
    model: Model,
    out: Out,
    calibration: Calibration,
    propagate: PropagateOption = Propagate.one_shot,
    samples: Samples = 128,
    length: Length = 2048,
    seed: Seed = 0,
    ratio: Ratio = 0.2,
    reduce_ratio: ReduceRatio = 0.95,
    multiple_of: MultipleOf = 64,
    batch_size: BatchSize = 8,
    dtype: DTypeOption = DType.auto,
    device: Device = "auto",
    nproc: NProc = 1,
) -> None:
    """Measure the activations of every FFN channel.

    One-shot statistics serve every ratio. In sequential mode they hold for one --ratio, --reduce-ratio and
    --multiple-of.

    Example: `camera capture MODEL stats --calibration text.txt --samples 64 --length 512`
    """
    from camera.checkpoints.checkpoint import Checkpoint
    from camera.data import calibration_windows
    from camera.files import whole_folder
    from camera.options import CalibrationOptions, CaptureOptions, PruneOptions
    from camera.pruning.capture import capture as run
    from camera.pruning.propagate import selection_of

    checkpoint = Checkpoint.open(model)
    checkpoint.check_shapes()
    options = checked(
        CaptureOptions, propagate=propagate, batch_size=batch_size, dtype=dtype, device=device, devices=nproc
    )
    prune_options = checked(PruneOptions, ratio=ratio, reduce_ratio=reduce_ratio, multiple_of=multiple_of)
    selection = selection_of(checkpoint, options, prune_options)
    text = checked(CalibrationOptions, **dataset(calibration), samples=samples, length=length, seed=seed)
    tokens_ST = calibration_windows(text, checkpoint)
    with whole_folder(out) as folder, progress_bar("capture") as progress:
        run(checkpoint, tokens_ST, folder, options, selection, progress)
    say(f"statistics of {tokens_ST.numel()} tokens: {out}")


def score(
    model: Model,
    captured: Annotated[Path, typer.Argument(help="Folder that `camera capture` wrote.", show_default=False)],
    out: Out,
    reduce_ratio: ReduceRatio = 0.95,
) -> None:
    """Turn statistics into one importance per FFN channel.

    Example: `camera score MODEL stats scores --reduce-ratio 0.95`
    """
    from camera.checkpoints.checkpoint import Checkpoint
    from camera.files import whole_folder
    from camera.options import PruneOptions
    from camera.pruning.score import score as run

    alpha = checked(PruneOptions, reduce_ratio=reduce_ratio).reduce_ratio
    with whole_folder(out) as folder, progress_bar("score") as progress:
        run(Checkpoint.open(model), captured, folder, alpha, progress)
    say(f"scores: {out}")


def prune(
    model: Model,
    out: Out,
    calibration: Annotated[
        str | None, typer.Option(help="As for capture; goes from capture to save.")
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(help="Instead: a folder of `camera score`; writes what `camera save` reads."),
    ] = None,
    ratio: Ratio = 0.2,
    reduce_ratio: ReduceRatio = 0.95,
    mode: Annotated[
        Mode, typer.Option(help="physical slices the matrices, mask writes zeros.")
    ] = Mode.physical,
    score: Annotated[
        Score, typer.Option(help="What chooses: CAMERA's energy, or obs, which knows what others take over.")
    ] = Score.energy,
    refit: Annotated[
        bool, typer.Option("--refit", help="Refit what stays to do the work of what goes, by least squares.")
    ] = False,
    damping: Annotated[
        float, typer.Option(help="For --refit and obs: share of the mean second moment added to each.")
    ] = 1e-3,
    per_round: Annotated[
        int | None,
        typer.Option("--round", help="For obs: channels that go at once; default a 64th of the width."),
    ] = None,
    steps: Annotated[
        int, typer.Option(help="Prune in so many steps, each measuring what the one before left.")
    ] = 1,
    sparsity: Annotated[
        float, typer.Option(help="Also set this share of the weights that stay to zero, by Wanda's metric.")
    ] = 0.0,
    sparsity_pattern: Annotated[
        Pattern, typer.Option(help="unstructured, or 2:4, which goes with --sparsity 0.5.")
    ] = Pattern.unstructured,
    allocation: Annotated[
        Allocation,
        typer.Option(help="One width for all layers, or as many channels spread by what cutting each costs."),
    ] = Allocation.uniform,
    allocation_bound: Annotated[
        float, typer.Option(help="For per_layer: how far from the one width, as a share of it.")
    ] = 0.5,
    allocation_windows: Annotated[
        int, typer.Option(help="For per_layer: calibration windows that the cost is measured on.")
    ] = 4,
    propagate: PropagateOption = Propagate.sequential,
    multiple_of: MultipleOf = 64,
    samples: Samples = 128,
    length: Length = 2048,
    seed: Seed = 0,
    batch_size: BatchSize = 8,
    dtype: DTypeOption = DType.auto,
    device: Device = "auto",
    nproc: NProc = 1,
) -> None:
    """Remove the least important FFN channels: capture, score, prune and save in one go.

    OUT is a standard Hugging Face folder. With --scores only the prune stage runs. --score obs with --refit loses
    least, at up to twice the time.

    Example: `camera prune openPangu-7B out --calibration text.jsonl --ratio 0.2 --reduce-ratio 0.95`

    Example: `camera prune openPangu-7B out --calibration text.jsonl --ratio 0.4 --score obs --refit`
    """
    from camera.checkpoints.checkpoint import Checkpoint
    from camera.errors import CameraError
    from camera.files import whole_folder
    from camera.options import CalibrationOptions, CaptureOptions, PruneOptions
    from camera.pruning.prune import prune as run
    from flows.commands.capture_to_save import capture_to_save

    if (calibration is None) == (scores is None):
        raise CameraError(
            "give either --calibration (to go from capture to save) or --scores (to prune alone)"
        )
    options = checked(
        PruneOptions,
        ratio=ratio,
        reduce_ratio=reduce_ratio,
        mode=mode,
        multiple_of=multiple_of,
        score=score,
        refit=refit,
        damping=damping,
        round=per_round,
        steps=steps,
        sparsity=sparsity,
        sparsity_pattern=sparsity_pattern,
        allocation=allocation,
        allocation_bound=allocation_bound,
        allocation_windows=allocation_windows,
    )
    if scores is not None and options.walks:
        raise CameraError(
            "--score obs, --refit, --steps, --sparsity and --allocation per_layer need the activations: "
            "give --calibration, not --scores"
        )
    checkpoint = Checkpoint.open(model)
    checkpoint.check_shapes()
    if scores is not None:
        with whole_folder(out) as folder, progress_bar("prune") as progress:
            run(checkpoint, scores, folder, options, progress)
        say(f"pruned matrices: {out}")
        return
    assert calibration is not None
    capture_to_save(
        checkpoint,
        out,
        checked(CalibrationOptions, **dataset(calibration), samples=samples, length=length, seed=seed),
        checked(
            CaptureOptions,
            propagate=propagate,
            batch_size=batch_size,
            dtype=dtype,
            device=device,
            devices=nproc,
        ),
        options,
    )


def save(
    model: Model,
    pruned: Annotated[Path, typer.Argument(help="Folder of `camera prune --scores`.", show_default=False)],
    out: Out,
) -> None:
    """Write the pruned model as a standard Hugging Face folder, and compare what was written.

    Example: `camera save MODEL pruned out`
    """
    from camera.checkpoints.checkpoint import Checkpoint
    from camera.files import whole_folder
    from camera.pruning.save import save as run
    from camera.report.card import write_card

    checkpoint = Checkpoint.open(model)
    with whole_folder(out) as folder, progress_bar("save") as progress:
        run(checkpoint, pruned, folder, progress)
        write_card(folder, checkpoint, pruned, base_model=model.name)
    say(f"model: {out}")
