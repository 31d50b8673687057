"""`camera prune` with calibration text: from capture to save in one walk over the layers."""

from pathlib import Path

from camera.checkpoints.checkpoint import Checkpoint
from camera.data import calibration_tokens
from camera.files import refuse_occupied
from camera.options import CalibrationOptions, CaptureOptions, PruneOptions
from camera.pruning.stream import prune_checkpoint
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
    base_model = checkpoint.folder.resolve().name

    def add_card(model: Path, pruned: Path) -> None:
        write_card(model, checkpoint, pruned, base_model=base_model, name=out.name)

    with progress_bar("prune") as progress:
        prune_checkpoint(checkpoint, tokens_ST, out, capture, options, progress, add_card)
    say(f"kept {Checkpoint.open(out).ffn_width} of {checkpoint.ffn_width} FFN channels in each layer: {out}")
