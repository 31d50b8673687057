"""Importance scoring as a stage."""

from camera.checkpoints.checkpoint import Checkpoint
from camera.options import Options
from camera.pruning.stages import score
from tasks.estimate import Needs
from tasks.stage import Context, Stage, register


class ScoreOptions(Options):
    """How importance is computed."""

    reduce_ratio: float


def run(context: Context) -> dict[str, float]:
    checkpoint = Checkpoint.open(context.inputs["model"])
    reduce_ratio = context.options.of(ScoreOptions).reduce_ratio
    score(checkpoint, context.inputs["statistics"], context.out, reduce_ratio, context.progress)
    return {}


STAGE = register(
    Stage(
        "score",
        5,
        run,
        {"score": ScoreOptions},
        lambda known: Needs(memory=3 * known.largest),
        intermediate=True,
        part="scores",
    )
)
