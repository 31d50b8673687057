"""Activation capture as a stage."""

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import read_tensors
from camera.options import CaptureOptions
from camera.pruning.capture import capture
from camera.pruning.propagate import Selection
from tasks.stage import Context, Stage
from tasks.stages.fetch import TOKENS


def run(context: Context) -> dict[str, float]:
    options = dict(context.options)
    selection = Selection(**chosen) if (chosen := options.pop("selection")) is not None else None
    tokens_ST = read_tensors(context.inputs["calibration"] / TOKENS)["input_ids"]
    checkpoint = Checkpoint.open(context.inputs["model"])
    capture(checkpoint, tokens_ST, context.out, CaptureOptions(**options), selection, context.progress)
    return {"tokens": tokens_ST.numel()}


STAGE = Stage("capture", version=1, run=run, resumes=True)
