"""HF save: a standard checkpoint folder of the pruned model, re-opened and compared before it counts."""

from pathlib import Path

import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.progress import Progress, silent
from camera.pruning.prune import Pruned
from camera.pruning.target import PrunedTarget, compare


def save(checkpoint: Checkpoint, pruned_folder: Path, out: Path, progress: Progress = silent) -> None:
    """Write the pruned model into the folder `out` in the source's own file layout.

    Tokenizer, generation config, remote code and licence are carried along. transformers builds the model from the
    saved config (on the meta device: every name and shape is checked), and every tensor is read back and compared.

    Args:
        checkpoint: the source model.
        pruned_folder: what `prune` wrote.
        out: an existing folder.
        progress: told (bytes, all): once while writing, once while comparing.

    Raises:
        CameraError: if the pruned folder is of another model, or what was written does not read back as it should.
    """
    pruned = Pruned.open(pruned_folder)
    pruned.check_belongs_to(checkpoint)
    total = 2 * sum(info.size_bytes for info in checkpoint.tensors.values())
    done = 0

    def tell(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    target = PrunedTarget(checkpoint, out, pruned.width, pruned.mode, changed=pruned.changed)
    try:
        for layer in range(checkpoint.layer_count):
            target.write_layer(layer, pruned.layer(layer).get)
        target.write_rest(tell)
        target.finish()
    finally:
        target.abandon()
    compare(checkpoint, Checkpoint.open(out), _Matrices(checkpoint, pruned), tell)


class _Matrices:
    """The changed matrices by name, a layer at a time."""

    def __init__(self, checkpoint: Checkpoint, pruned: Pruned) -> None:
        self._pruned = pruned
        self._layer_of = {
            name: layer
            for layer in range(checkpoint.layer_count)
            for name in checkpoint.family.ffn_names(layer)
        }
        self._loaded: tuple[int, dict[str, torch.Tensor]] = (-1, {})

    def __call__(self, name: str) -> torch.Tensor | None:
        layer = self._layer_of.get(name)
        if layer is None:
            return None
        if self._loaded[0] != layer:
            self._loaded = (layer, self._pruned.layer(layer))
        return self._loaded[1].get(name)
