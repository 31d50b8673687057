"""HF save: a standard checkpoint folder of the pruned model, re-opened and compared before it counts."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from camera.checkpoints.checkpoint import INDEX_NAME, Checkpoint
from camera.checkpoints.safetensors_file import SafetensorsWriter
from camera.errors import CameraError
from camera.files import read_json, write_json
from camera.progress import Progress, silent
from camera.pruning.prune import Pruned


def save(checkpoint: Checkpoint, pruned_folder: Path, out: Path, progress: Progress = silent) -> None:
    """Write the pruned model into the folder `out` in the source's own file layout.

    Shards keep their names and the order of their tensors; one in which nothing changed is copied as it is, so
    that ratio 0 gives back every byte. Tokenizer, generation config, remote code and licence are carried along.

    Args:
        checkpoint: the source model.
        pruned_folder: what `prune` wrote.
        out: an existing folder.
        progress: told (bytes written, all), then the same once more for the comparison.

    Raises:
        CameraError: if what was written does not read back as it should.
    """
    pruned = Pruned.open(pruned_folder)
    if pruned.layers != checkpoint.layer_count:
        raise CameraError(
            f"{pruned_folder} has {pruned.layers} layers and {checkpoint.folder} {checkpoint.layer_count}"
        )
    changed = _Changes(checkpoint, pruned)
    total = 2 * sum(info.size_bytes for info in checkpoint.tensors.values())
    done = 0
    for file in checkpoint.weight_files:
        names = [name for name, info in checkpoint.tensors.items() if info.file == file]
        if not any(changed.layer_of(name) is not None for name in names):
            shutil.copyfile(checkpoint.folder / file, out / file)
            done += sum(checkpoint.tensors[name].size_bytes for name in names)
            progress(done, total)
            continue
        layout = {name: (checkpoint.tensors[name].dtype, changed.shape(name)) for name in names}
        with SafetensorsWriter(out / file, layout) as writer:
            for name in names:
                writer.write(name, changed.tensor(name))
                done += checkpoint.tensors[name].size_bytes
                progress(done, total)
    _write_config(checkpoint, pruned, out)
    _write_index(checkpoint, changed, out)
    for name in checkpoint.side_files:
        if name != "config.json":
            shutil.copyfile(checkpoint.folder / name, out / name)
    _compare(changed, out, lambda read: progress(total // 2 + read, total))


class _Changes:
    """The tensors of the target: those that prune changed, and the source's for all others."""

    def __init__(self, checkpoint: Checkpoint, pruned: Pruned) -> None:
        self.checkpoint = checkpoint
        self.pruned = pruned
        self._layer_of: dict[str, int] = {}
        if any(pruned.folder.glob("layer-*.safetensors")):
            for layer in range(checkpoint.layer_count):
                self._layer_of.update(dict.fromkeys(checkpoint.family.ffn_names(layer), layer))
        self._loaded: tuple[int, dict[str, torch.Tensor]] = (-1, {})

    def layer_of(self, name: str) -> int | None:
        """The layer whose pruned file holds a tensor, or None if the tensor is the source's."""
        return self._layer_of.get(name)

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self.checkpoint.tensors[name].shape
        if self.layer_of(name) is None or self.pruned.mode != "physical":
            return shape
        return (
            (shape[0], self.pruned.width)
            if name.endswith("down_proj.weight")
            else (self.pruned.width, shape[1])
        )

    def tensor(self, name: str) -> torch.Tensor:
        layer = self.layer_of(name)
        if layer is None:
            return self.checkpoint.read(name)
        if self._loaded[0] != layer:  # a memory-mapped file per layer: keep the last one open
            self._loaded = (layer, self.pruned.layer(layer))
        return self._loaded[1][name]


def _write_config(checkpoint: Checkpoint, pruned: Pruned, out: Path) -> None:
    """config.json with the new width; byte for byte the source's where the width is the same."""
    source = checkpoint.folder / "config.json"
    if pruned.mode != "physical" or pruned.width == checkpoint.ffn_width:
        shutil.copyfile(source, out / "config.json")
        return
    config: dict[str, Any] = {**read_json(source), "intermediate_size": pruned.width}
    write_json(out / "config.json", config)


def _write_index(checkpoint: Checkpoint, changed: _Changes, out: Path) -> None:
    source = checkpoint.folder / INDEX_NAME
    if not source.is_file():
        return
    index = json.loads(source.read_text(encoding="utf-8"))
    before, after = (
        sum(_bytes(shape(name), info.dtype) for name, info in checkpoint.tensors.items())
        for shape in (lambda name: checkpoint.tensors[name].shape, changed.shape)
    )
    if before == after:
        shutil.copyfile(source, out / INDEX_NAME)
        return
    index.setdefault("metadata", {})["total_size"] = after
    index["metadata"].pop("total_parameters", None)
    write_json(out / INDEX_NAME, index)


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    count = dtype.itemsize
    for extent in shape:
        count *= extent
    return count


def _compare(changed: _Changes, out: Path, tell: Any) -> None:
    """Re-open what was written: transformers must accept the config, and every tensor must be the one meant.

    The comparison streams; loading the whole model a second time would need all its memory.
    """
    written = Checkpoint.open(out)
    written.check_shapes()
    read = 0
    for name, info in changed.checkpoint.tensors.items():
        if name not in written.tensors or not torch.equal(
            _raw(written.read(name)), _raw(changed.tensor(name))
        ):
            raise CameraError(
                f"{out}: {name} does not read back as it was written; check the disk and run again"
            )
        read += info.size_bytes
        tell(read)


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, so that NaN equals NaN and −0 does not equal 0."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
