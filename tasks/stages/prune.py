"""Physical prune as a stage: which channels stay, and the matrices that are no slices of the source's."""

import logging

from camera.checkpoints.checkpoint import Checkpoint
from camera.files import read_json
from camera.options import CaptureOptions, PruneOptions
from camera.pruning.plan import plan_prune
from camera.pruning.stages import prune
from camera.pruning.summary import SUMMARY, complaints
from tasks.estimate import Needs
from tasks.stage import Context, Stage, register

_log = logging.getLogger("camera.prune")


def run(context: Context) -> dict[str, float]:
    checkpoint = Checkpoint.open(context.inputs["model"])
    options = context.options.of(PruneOptions)
    captured = context.inputs["captured"]
    capturing = CaptureOptions(propagate=read_json(captured / "capture.json")["propagate"])
    plan = plan_prune(checkpoint, capturing, options)
    prune(checkpoint, context.inputs["scores"], context.out, plan, options, captured)
    summary = read_json(context.out / SUMMARY)
    shares = summary["importance_kept_share"]
    decisions = summary.get("decisions", [])
    for line in complaints(summary):
        _log.warning("%s", line)
    return {
        "kept_width": summary["kept_width"],
        **({"experts_kept": summary["experts_kept"]} if "experts_kept" in summary else {}),
        "removed_share": summary["removed_share"],
        "importance_kept_mean": sum(shares) / len(shares),
        **{f"importance_kept.layer_{index:03d}": share for index, share in enumerate(shares)},
        **({"refitted_layers": sum(one["refitted"] for one in decisions)} if decisions else {}),
    }


STAGE = register(
    Stage(
        "prune",
        6,
        run,
        {"prune": PruneOptions},
        lambda known: Needs(disk=known.new_matrices),
        intermediate=True,
        part="pruned",
    )
)
