"""The files of a pruned checkpoint, in the source's own layout, filled layer by layer.

Shards keep their names and the order of their tensors, so every size is known before the first weight is read: the
shards are laid out at once and filled in any order, and a killed writer goes on in the same files. A shard in which
nothing changes is copied as it is, so that ratio 0 gives back every byte.
"""

import shutil
from collections.abc import Callable
from math import prod
from pathlib import Path

import torch

from camera.checkpoints.checkpoint import INDEX_NAME, Checkpoint
from camera.checkpoints.safetensors_file import SafetensorsWriter
from camera.errors import CameraError
from camera.files import read_json, write_json


class PrunedTarget:
    """A checkpoint folder being written from a source checkpoint and the matrices that changed."""

    def __init__(
        self,
        source: Checkpoint,
        out: Path,
        width: int,
        mode: str,
        *,
        changed: bool | None = None,
        resume: bool = False,
    ) -> None:
        """Lay out the shards.

        Args:
            source: the unpruned model.
            out: an existing folder.
            width: kept FFN channels.
            mode: `physical` or `mask`.
            changed: whether feed-forward matrices change; the default is where channels go.
            resume: go on with the shards that an earlier target of the same kind left in `out`.
        """
        self._source = source
        self._out = out
        self._width = width
        self._narrower = mode == "physical" and width < source.ffn_width
        ffn = {name for layer in range(source.layer_count) for name in source.family.ffn_names(layer)}
        self._changes = ffn if (width < source.ffn_width if changed is None else changed) else set()
        self._missing = set(source.tensors)
        self._writers: dict[str, SafetensorsWriter] = {}
        for file in source.weight_files:
            names = [name for name, info in source.tensors.items() if info.file == file]
            if self._changes.isdisjoint(names):
                continue
            layout = {name: (source.tensors[name].dtype, self.shape(name)) for name in names}
            self._writers[file] = SafetensorsWriter(out / file, layout, resume=resume)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor in the pruned model."""
        shape = self._source.tensors[name].shape
        if not self._narrower or name not in self._changes:
            return shape
        return (shape[0], self._width) if name.endswith("down_proj.weight") else (self._width, shape[1])

    def already_written(self, layer: int) -> None:
        """Count a layer as written by the target that this one resumes."""
        names = self._layer(layer)
        self._missing.difference_update(names)
        for writer in self._writers.values():
            writer.already_written(names)

    def write_layer(self, layer: int, matrices: Callable[[str], torch.Tensor | None]) -> None:
        """Write one decoder layer: its changed matrices as `matrices` gives them, one at a time; the rest as it is."""
        for name in self._layer(layer):
            self._write(name, matrices(name) if name in self._changes else None)

    def write_rest(self, tell: Callable[[int], None] = lambda count: None) -> None:
        """Write all that is not written yet, from the source: embedding, norms, head, whole unchanged shards.

        Args:
            tell: told the bytes of each.

        Raises:
            ValueError: if a matrix that changes was never given.
        """
        for file in self._source.weight_files:
            names = [name for name, info in self._source.tensors.items() if info.file == file]
            if file not in self._writers:
                shutil.copyfile(self._source.folder / file, self._out / file)
                self._missing.difference_update(names)
            for name in names:
                if name in self._missing:
                    self._write(name, None)
                tell(self._source.tensors[name].size_bytes)

    def sync(self) -> None:
        """Make durable what was written so far."""
        for writer in self._writers.values():
            writer.sync()

    def finish(self) -> None:
        """Close the shards and write config, index and the files that are carried along.

        Raises:
            ValueError: if a tensor was not written.
            CameraError: if transformers does not accept the result.
        """
        for writer in self._writers.values():
            writer.close()
        self._write_config()
        self._write_index()
        for name in self._source.side_files:
            if name != "config.json":
                shutil.copyfile(self._source.folder / name, self._out / name)
        Checkpoint.open(self._out).check_shapes()

    def abandon(self) -> None:
        """Close the shards as they are, to be resumed or removed."""
        for writer in self._writers.values():
            writer.__exit__(InterruptedError, None, None)

    def _layer(self, layer: int) -> list[str]:
        prefix = self._source.family.layer_prefix(layer)
        return [name for name in self._source.tensors if name.startswith(prefix)]

    def _write(self, name: str, matrix: torch.Tensor | None) -> None:
        info = self._source.tensors[name]
        writer = self._writers.get(info.file)
        if writer is None:
            return  # its shard is copied whole, with the rest
        if matrix is not None:
            writer.write(name, matrix)
        elif name in self._changes:
            raise ValueError(f"{name} changes, and was not given")
        else:
            writer.copy(name, self._source.folder / info.file, info)
        self._missing.discard(name)

    def _write_config(self) -> None:
        """config.json with the new width; byte for byte the source's where the width is the same."""
        source = self._source.folder / "config.json"
        if self._narrower:
            write_json(self._out / "config.json", {**read_json(source), "intermediate_size": self._width})
        else:
            shutil.copyfile(source, self._out / "config.json")

    def _write_index(self) -> None:
        source = self._source.folder / INDEX_NAME
        if not source.is_file():
            return
        if not self._narrower:
            shutil.copyfile(source, self._out / INDEX_NAME)
            return
        index = read_json(source)
        metadata = {**index.get("metadata", {})}
        metadata.pop("total_parameters", None)
        metadata["total_size"] = sum(
            prod(self.shape(name)) * info.dtype.itemsize for name, info in self._source.tensors.items()
        )
        write_json(self._out / INDEX_NAME, {**index, "metadata": metadata})


def compare(
    source: Checkpoint,
    written: Checkpoint,
    matrices: Callable[[str], torch.Tensor | None],
    tell: Callable[[int], None],
) -> None:
    """Read every tensor back and hold it against the one meant: the given matrix, or the source's.

    It streams; loading the whole model a second time would need all its memory.

    Args:
        source: the unpruned model.
        written: the pruned model.
        matrices: the changed matrix of a name, or None.
        tell: told the bytes of each tensor.

    Raises:
        CameraError: naming the tensor that differs.
    """
    for name, info in source.tensors.items():
        matrix = matrices(name)
        meant = source.read(name) if matrix is None else matrix
        if name not in written.tensors or not torch.equal(_raw(written.read(name)), _raw(meant)):
            raise CameraError(
                f"{written.folder}: {name} does not read back as it was written; check the disk and run again"
            )
        tell(info.size_bytes)


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, so that NaN equals NaN and −0 does not equal 0."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
