"""What the cut of each layer cost its own output, as a prune that looks at the activations recorded it."""

from pathlib import Path

from camera.files import read_json
from camera.pruning.decision import SUMMARY
from camera.report.schema import LayerDamage


def layer_damage(pruned: Path | None) -> tuple[LayerDamage, ...]:
    """The damage of every layer that has one in `prune.json`.

    Args:
        pruned: what `prune` wrote, if it did.
    """
    if pruned is None:
        return ()
    damage = []
    for decision in read_json(pruned / SUMMARY).get("decisions", []):
        plain, tried = decision["error_camera"], decision["error"]
        if plain is not None:
            kept = plain if decision["fallback"] or tried is None else tried
            damage.append(
                LayerDamage(layer=decision["layer"], plain=plain, kept=kept, refitted=decision["refitted"])
            )
    return tuple(damage)
