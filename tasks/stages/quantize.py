"""Quantisation as a stage."""

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import read_tensors
from camera.options import QuantizeOptions
from camera.quantization.quantize_calibrated import quantize_calibrated
from tasks.stage import Context, Stage
from tasks.stages.fetch import TOKENS


def run(context: Context) -> dict[str, float]:
    checkpoint = Checkpoint.open(context.inputs["model"])
    tokens_ST = None
    if "calibration" in context.inputs:  # of a method that calibrates
        tokens_ST = read_tensors(context.inputs["calibration"] / TOKENS)["input_ids"]
    report = quantize_calibrated(
        checkpoint, context.out, QuantizeOptions(**context.options), tokens_ST, progress=context.progress
    )
    return {
        "bits_per_weight": report.bits_per_weight,
        "bytes": report.bytes,
        "relative_error": report.relative_error,
    }


STAGE = Stage("quantize", version=1, run=run, resumes=True)
