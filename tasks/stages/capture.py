"""Activation capture as a stage."""

from dataclasses import replace

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import read_tensors
from camera.options import CaptureOptions, PruneOptions
from camera.pruning.plan import plan_prune
from camera.pruning.stages import capture
from tasks.stage import Context, Stage
from tasks.stages.fetch import TOKENS


def run(context: Context) -> dict[str, float]:
    options = dict(context.options)
    decided = options.pop("decide")
    capturing = CaptureOptions(**options)
    tokens_ST = read_tensors(context.inputs["calibration"] / TOKENS)["input_ids"]
    checkpoint = Checkpoint.open(context.inputs["model"])
    plan = None
    if (
        decided is not None
    ):  # the width is given as such, so that every ratio that comes to it shares the capture
        asked = PruneOptions(ratio=0.0, **{name: decided[name] for name in decided.keys() - {"kept"}})
        plan = replace(plan_prune(checkpoint, capturing, asked), kept=decided["kept"])
    capture(checkpoint, tokens_ST, context.out, capturing, plan, context.progress)
    return {"tokens": tokens_ST.numel()}


STAGE = Stage("capture", version=2, run=run, resumes=True)
