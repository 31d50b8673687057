"""`camera prune` with calibration text: from capture to save in one folder."""

import shutil
from pathlib import Path

from camera.checkpoints.checkpoint import Checkpoint
from camera.data import calibration_tokens
from camera.files import whole_folder
from camera.options import CalibrationOptions, CaptureOptions, PruneOptions
from camera.pruning.capture import capture, selection_of
from camera.pruning.prune import Pruned, prune
from camera.pruning.save import save
from camera.pruning.score import score
from camera.report.card import write_card
from flows.commands.common import progress_bar, say


def capture_to_save(
    checkpoint: Checkpoint,
    out: Path,
    calibration: CalibrationOptions,
    capture_options: CaptureOptions,
    options: PruneOptions,
) -> None:
    """Write the pruned model to `out`; intermediate files live beside it and are removed."""
    selection = selection_of(checkpoint, capture_options, options)
    tokens_ST = calibration_tokens(calibration, checkpoint.load_tokenizer())
    with whole_folder(out) as folder:
        work = folder / ".work"
        captured, scored, pruned = (work / name for name in ("capture", "score", "prune"))
        for made in (captured, scored, pruned):
            made.mkdir(parents=True)
        with progress_bar("capture") as progress:
            capture(checkpoint, tokens_ST, captured, capture_options, selection, progress)
        score(checkpoint, captured, scored, options.reduce_ratio)
        with progress_bar("prune") as progress:
            prune(checkpoint, scored, pruned, options, progress)
        with progress_bar("save") as progress:
            save(checkpoint, pruned, folder, progress)
        write_card(folder, checkpoint, pruned, base_model=checkpoint.folder.resolve().name)
        kept = Pruned.open(pruned).width
        shutil.rmtree(work)
    say(f"kept {kept} of {checkpoint.ffn_width} FFN channels in each layer: {out}")
