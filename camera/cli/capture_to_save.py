"""`camera prune` with calibration text: from capture to save in one run over the layers."""

from pathlib import Path
from typing import Any

from camera.checkpoints.checkpoint import Checkpoint
from camera.cli.output import progress_bar, say
from camera.data import calibration_windows
from camera.errors import CameraError
from camera.files import read_json, refuse_occupied
from camera.locks import LockedError
from camera.options import CalibrationOptions, CaptureOptions, PruneOptions
from camera.pruning.decision import SUMMARY
from camera.pruning.prune_checkpoint import prune_checkpoint, unfinished
from camera.report.card import write_card
from camera.report.words import percent


def capture_to_save(
    checkpoint: Checkpoint,
    out: Path,
    calibration: CalibrationOptions,
    capture: CaptureOptions,
    options: PruneOptions,
) -> None:
    """Write the pruned model to `out`; a killed command goes on at the layer it was in."""
    refuse_occupied(out)
    tokens_ST = calibration_windows(calibration, checkpoint)
    base_model = checkpoint.folder.resolve().name

    summary: dict[str, Any] = {}

    def add_card(model: Path, pruned: Path) -> None:
        write_card(model, checkpoint, pruned, base_model=base_model, name=out.name)
        summary.update(read_json(pruned / SUMMARY))

    try:
        with progress_bar("prune") as progress:
            prune_checkpoint(checkpoint, tokens_ST, out, capture, options, progress, add_card)
    except CameraError as error:
        if not unfinished(out).is_dir() or isinstance(error, LockedError):
            raise
        raise CameraError(
            f"{error}\nWhat was done is kept in {unfinished(out)}: the same command goes on there; remove it if it is not "
            "wanted"
        ) from error
    say(f"kept {summary['kept_width']} of {checkpoint.ffn_width} FFN channels in each layer: {out}")
    decisions = summary.get("decisions", [])
    if options.method != "camera" and decisions:
        say(f"refitted {sum(one['refitted'] for one in decisions)} of {len(decisions)} down projections")
    shares = [share for one in decisions for share in (one["zero_shares"] or {}).values()]
    if shares:  # matrices of one size, so that the mean is the share of all
        say(f"{percent(sum(shares) / len(shares))} of the feed-forward weights that stay are zero")
    for one in decisions:
        if one["fallback"]:
            say(f"layer {one['layer']}: {options.method} rejected, fell back to CAMERA: {one['fallback']}")
