"""The sink that writes a pruned checkpoint: the source's own layout of files, filled decision by decision.

Shards keep their names and the order of their tensors, so every size is known before the first weight is read: the
shards are laid out at once and filled in any order, and a killed writer goes on in the same files. A shard in which
nothing changes is copied as it is, so that ratio 0 gives back every byte.
"""

import shutil
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path

import torch

from camera.checkpoints.checkpoint import INDEX_NAME, Checkpoint
from camera.checkpoints.safetensors_file import SafetensorsWriter
from camera.errors import CameraError
from camera.files import read_json, write_json
from camera.layerwise.statistics import gather_channels


class ModelWriter:
    """A checkpoint folder being written from a source checkpoint and the decisions of its layers."""

    def __init__(
        self, source: Checkpoint, out: Path, width: int, mode: str, *, changed: bool, resume: bool = False
    ) -> None:
        """Lay out the shards.

        Args:
            source: the unpruned model.
            out: an existing folder.
            width: kept FFN channels.
            mode: `physical` or `mask`.
            changed: whether feed-forward matrices change.
            resume: go on with the shards that an earlier writer of the same kind left in `out`.
        """
        self._source = source
        self._out = out
        self._width = width
        self._mode = mode
        self._narrower = mode == "physical" and width < source.ffn_width
        self._changes = feed_forward_matrices(source) if changed else {}
        self._missing = set(source.tensors)
        self._writers: dict[str, SafetensorsWriter] = {}
        for file in source.weight_files:
            names = [name for name, info in source.tensors.items() if info.file == file]
            if self._changes.keys().isdisjoint(names):
                continue
            layout = {name: (source.tensors[name].dtype, self.shape(name)) for name in names}
            self._writers[file] = SafetensorsWriter(out / file, layout, resume=resume)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor in the pruned model."""
        shape = self._source.tensors[name].shape
        if not self._narrower or name not in self._changes:
            return shape
        dimension = self._changes[name][1]
        return tuple(self._width if at == dimension else size for at, size in enumerate(shape))

    def already_written(self, layer: int) -> None:
        """Count a layer as written by the writer that this one resumes."""
        names = self._layer(layer)
        self._missing.difference_update(names)
        for writer in self._writers.values():
            writer.already_written(names)

    def write(self, layer: int, kept_K: torch.Tensor, matrices: Mapping[str, torch.Tensor]) -> None:
        """Write one decoder layer, a matrix at a time.

        Args:
            layer: its number.
            kept_K: int64 [K], the channels that stay.
            matrices: by Hugging Face name, those of the kept channels that are no slices of the source's.
        """
        for name in self._layer(layer):
            matrix = None
            if name in self._changes:
                dimension = self._changes[name][1]
                matrix = pruned_matrix(self._source, name, dimension, kept_K, self._mode, matrices.get(name))
            self._write(name, matrix)

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
            write_json(
                self._out / "config.json",
                {**read_json(source), self._source.blocks(0)[0].width_key: self._width},
            )
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


def feed_forward_matrices(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """Of every feed-forward matrix its layer, and which of its dimensions the channels are."""
    return {
        name: (layer, dimension)
        for layer in range(checkpoint.layer_count)
        for block in checkpoint.blocks(layer)
        for name, dimension in ((block.gate, 0), (block.up, 0), (block.down, 1))
    }


def pruned_matrix(
    checkpoint: Checkpoint,
    name: str,
    dimension: int,
    kept_K: torch.Tensor,
    mode: str,
    own: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gate [F, H], up [F, H] or down [H, F] of a layer without the other channels.

    Args:
        checkpoint: the source.
        name: Hugging Face name of the matrix.
        dimension: that the channels are.
        kept_K: int64 [K], the channels that stay.
        mode: `physical` slices (K in place of F), `mask` zeroes.
        own: what stands in place of the kept rows or columns, in their dtype; None for themselves.

    Raises:
        CameraError: if the matrix holds NaN or infinity.
    """
    if own is not None:
        if mode == "physical":
            return own
        return own.new_zeros(checkpoint.tensors[name].shape).index_copy_(dimension, kept_K, own)
    matrix = checkpoint.read_finite(name)
    if mode == "physical":
        return gather_channels(matrix, kept_K) if dimension == 1 else matrix.index_select(0, kept_K)
    stays_F = torch.zeros(matrix.shape[dimension], dtype=torch.bool)
    stays_F[kept_K] = True
    stays = stays_F if dimension == 1 else stays_F[:, None]
    return torch.where(stays, matrix, torch.zeros((), dtype=matrix.dtype))


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
