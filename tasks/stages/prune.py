"""Physical prune as a stage."""

from camera.checkpoints.checkpoint import Checkpoint
from camera.files import read_json
from camera.options import PruneOptions
from camera.pruning.prune import SUMMARY, prune
from tasks.stage import Context, Stage


def run(context: Context) -> dict[str, float]:
    checkpoint = Checkpoint.open(context.inputs["model"])
    prune(
        checkpoint, context.inputs["scores"], context.out, PruneOptions(**context.options), context.progress
    )
    summary = read_json(context.out / SUMMARY)
    shares = summary["importance_kept_share"]
    return {
        "kept_width": summary["kept_width"],
        "removed_share": summary["removed_share"],
        "importance_kept_mean": sum(shares) / len(shares),
        **{f"importance_kept.layer_{index:03d}": share for index, share in enumerate(shares)},
    }


STAGE = Stage("prune", version=1, run=run, resumes=True)
