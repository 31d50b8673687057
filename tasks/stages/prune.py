"""Physical prune as a stage: which channels stay, and the matrices that are no slices of the source's."""

import logging
from typing import Any

from camera.checkpoints.checkpoint import Checkpoint
from camera.files import read_json
from camera.options import CaptureOptions, PruneOptions
from camera.pruning.decision import SUMMARY
from camera.pruning.plan import plan_prune
from camera.pruning.stages import prune
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
    for layer, reasons in _fallbacks(decisions).items():
        several = f" ({len(reasons)} of its networks)" if len(reasons) > 1 else ""
        _log.warning("layer %d fell back to CAMERA's choice%s: %s", layer, several, reasons[0])
    for layer, idle in summary.get("ranked_by_weights", {}).items():
        names = ", ".join(f"{label} ({tokens} tokens)" for label, tokens in idle.items())
        _log.warning("layer %s: too few tokens, ranked by their weights alone: %s", layer, names)
    return {
        "kept_width": summary["kept_width"],
        **({"experts_kept": summary["experts_kept"]} if "experts_kept" in summary else {}),
        "removed_share": summary["removed_share"],
        "importance_kept_mean": sum(shares) / len(shares),
        **{f"importance_kept.layer_{index:03d}": share for index, share in enumerate(shares)},
        **({"refitted_layers": sum(one["refitted"] for one in decisions)} if decisions else {}),
    }


def _fallbacks(decisions: list[dict[str, Any]]) -> dict[int, list[str]]:
    """Why networks fell back, by layer."""
    found: dict[int, list[str]] = {}
    for one in decisions:
        if one["fallback"]:
            found.setdefault(one["layer"], []).append(one["fallback"])
    return found


STAGE = register(
    Stage(
        "prune",
        5,
        run,
        {"prune": PruneOptions},
        lambda known: Needs(disk=known.new_matrices),
        intermediate=True,
        part="pruned",
    )
)
