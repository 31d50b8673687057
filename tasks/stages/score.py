"""Importance scoring as a stage."""

from camera.checkpoints.checkpoint import Checkpoint
from camera.pruning.stages import score
from tasks.stage import Context, Stage


def run(context: Context) -> dict[str, float]:
    checkpoint = Checkpoint.open(context.inputs["model"])
    score(
        checkpoint,
        context.inputs["statistics"],
        context.out,
        context.options["reduce_ratio"],
        context.progress,
    )
    return {}


STAGE = Stage("score", version=2, run=run)
