"""Physical prune as a stage: from scores, or from calibration tokens where pruning walks through the model."""

import logging
from typing import Any

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import read_tensors
from camera.files import read_json
from camera.options import CaptureOptions, PruneOptions
from camera.pruning.prune import SUMMARY, prune
from camera.pruning.prune_by_walk import prune_by_walk
from tasks.stage import Context, Stage
from tasks.stages.fetch import TOKENS

_log = logging.getLogger("camera.prune")


def run(context: Context) -> dict[str, float]:
    checkpoint = Checkpoint.open(context.inputs["model"])
    if "calibration" in context.inputs:
        tokens_ST = read_tensors(context.inputs["calibration"] / TOKENS)["input_ids"]
        how = CaptureOptions(**_those_of(CaptureOptions, context.options))
        what = PruneOptions(**_those_of(PruneOptions, context.options))
        prune_by_walk(checkpoint, tokens_ST, context.out, how, what, context.progress)
    else:
        options = PruneOptions(**context.options)
        prune(checkpoint, context.inputs["scores"], context.out, options, context.progress)
    summary = read_json(context.out / SUMMARY)
    shares = summary["importance_kept_share"]
    cuts = summary.get("cuts", [])
    for cut in cuts:
        if cut["refused"]:
            _log.warning("layer %d was pruned plainly: %s", cut["layer"], cut["refused"])
    return {
        "kept_width": summary["kept_width"],
        "removed_share": summary["removed_share"],
        "importance_kept_mean": sum(shares) / len(shares),
        **{f"importance_kept.layer_{index:03d}": share for index, share in enumerate(shares)},
        **({"refitted_layers": sum(cut["refitted"] for cut in cuts)} if cuts else {}),
    }


def _those_of(kind: type[CaptureOptions | PruneOptions], options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in kind.model_fields}


STAGE = Stage("prune", version=1, run=run, resumes=True)
