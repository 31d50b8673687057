"""Quantisation as a stage."""

from camera.checkpoints.checkpoint import Checkpoint
from camera.formats.quantize import quantize_checkpoint
from camera.options import QuantizeOptions
from tasks.stage import Context, Stage


def run(context: Context) -> dict[str, float]:
    checkpoint = Checkpoint.open(context.inputs["model"])
    report = quantize_checkpoint(
        checkpoint, context.out, QuantizeOptions(**context.options), context.progress
    )
    return {
        "bits_per_weight": report.bits_per_weight,
        "bytes": report.bytes,
        "relative_error": report.relative_error,
    }


STAGE = Stage("quantize", version=1, run=run, resumes=True)
