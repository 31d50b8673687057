"""What the cut of each layer cost its own output, as a prune that looks at the activations recorded it."""

from pathlib import Path

from camera.files import read_json
from camera.pruning.prune import SUMMARY
from camera.report.schema import LayerDamage


def layer_damage(pruned: Path | None) -> tuple[LayerDamage, ...]:
    """The damage of every layer that has one in `prune.json`; of several steps the last.

    Args:
        pruned: what `prune` wrote, if it did.
    """
    if pruned is None:
        return ()
    damage: dict[int, LayerDamage] = {}
    for cut in read_json(pruned / SUMMARY).get("cuts", []):
        plain, tried = cut["error_plain"], cut["error"]
        if plain is None:
            damage.pop(cut["layer"], None)
            continue
        kept = plain if cut["refused"] or tried is None else tried
        damage[cut["layer"]] = LayerDamage(
            layer=cut["layer"], step=cut["step"], plain=plain, kept=kept, refitted=cut["refitted"]
        )
    return tuple(damage[layer] for layer in sorted(damage))
