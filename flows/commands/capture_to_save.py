"""`camera prune` with calibration text: from capture to save in one walk over the layers."""

from pathlib import Path

from camera.checkpoints.checkpoint import Checkpoint
from camera.data import calibration_tokens
from camera.files import refuse_occupied
from camera.options import CalibrationOptions, CaptureOptions, PruneOptions
from camera.pruning.prune import Pruned
from camera.pruning.stream import finish_work, prune_checkpoint
from camera.report.card import write_card
from flows.commands.common import progress_bar, say


def capture_to_save(
    checkpoint: Checkpoint,
    out: Path,
    calibration: CalibrationOptions,
    capture: CaptureOptions,
    options: PruneOptions,
) -> None:
    """Write the pruned model to `out`; a killed command goes on at the layer it was in."""
    refuse_occupied(out)
    tokens_ST = calibration_tokens(calibration, checkpoint.load_tokenizer())
    with progress_bar("prune") as progress:
        work = prune_checkpoint(checkpoint, tokens_ST, out, capture, options, progress)
    write_card(out, checkpoint, work, base_model=checkpoint.folder.resolve().name)
    kept = Pruned.open(work).width
    finish_work(work)
    say(f"kept {kept} of {checkpoint.ffn_width} FFN channels in each layer: {out}")
