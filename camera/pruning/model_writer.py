"""The sink that writes a pruned checkpoint: the source's own layout of files, filled decision by decision.

Shards keep their names and the order of their tensors, so every size is known before the first weight is read: the
shards are laid out at once and filled in any order, and a killed writer goes on in the same files. A shard in which
nothing changes is copied as it is, so that ratio 0 gives back every byte.
"""

import hashlib
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.rows import CHUNK_BYTES, StoredRows
from camera.checkpoints.safetensors_file import SafetensorsWriter, read_header
from camera.checkpoints.weights import INDEX_NAME
from camera.errors import CameraError
from camera.files import copy_file, read_json, write_json
from camera.layerwise.statistics import gather_channels, rows_of
from camera.models import Placed
from camera.pruning.decision import Stays


class ModelWriter:
    """A checkpoint folder being written from a source checkpoint and the decisions of its layers."""

    def __init__(
        self,
        source: Checkpoint,
        out: Path,
        mode: str,
        changes: Mapping[str, Any],
        *,
        changed: bool,
        resume: bool = False,
    ) -> None:
        """Lay out the shards.

        Args:
            source: the unpruned model.
            out: an existing folder.
            mode: `physical` or `mask`.
            changes: keys of config.json that have other values.
            changed: whether feed-forward matrices change.
            resume: go on with the shards that an earlier writer of the same kind left in `out`.
        """
        self._source = source
        self._out = out
        self._mode = mode
        self._changes = changes
        self._places = changing_tensors(source, changes) if changed else {}
        self.tensors = {name: info for name, info in source.tensors.items() if not self._goes(name)}
        self._missing = set(self.tensors)
        self._digests: dict[int, str] = {}
        self._written: list[int] = []
        self.durable: list[int] = []
        """Decoder layers that are whole in the shards, and on the disk."""
        self._writers: dict[str, SafetensorsWriter] = {}
        for file in source.weight_files:
            names = self._of_file(file)
            every = read_header(source.folder / file)  # with left-overs, and what another file holds too
            if len(names) == len(every) and self._places.keys().isdisjoint(names):
                continue
            layout = {name: (source.tensors[name].dtype, self.shape(name)) for name in names}
            if layout:
                self._writers[file] = SafetensorsWriter(out / file, layout, resume=resume)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor in the pruned model."""
        if not self._changes or name not in self._places:
            return self._source.tensors[name].shape
        family, config = self._source.family, {**self._source.config, **self._changes}
        return family.shape(config, self._places[name].weight)

    def _goes(self, name: str) -> bool:
        """Whether the pruned model lacks a tensor: experts beyond its last, and layers that predict further tokens."""
        if not self._changes:
            return False
        place = self._places.get(name)
        experts = self._source.family.experts
        if place is not None and place.expert is not None and experts is not None:
            return place.expert >= experts.count({**self._source.config, **self._changes})
        return name in self._source.prediction_tensors

    def _of_file(self, file: str) -> list[str]:
        return [name for name, info in self.tensors.items() if info.file == file]

    def already_written(self, layer: int) -> None:
        """Count a layer as written by the writer that this one resumes."""
        names = self._layer(layer)
        self._written.append(layer)
        self._missing.difference_update(names)
        for writer in self._writers.values():
            writer.already_written(names)

    def write(self, layer: int, stays: Stays) -> None:
        """Write one decoder layer, a matrix at a time."""
        for name in self._layer(layer):
            self._write(name, pruned_tensor(self._source, self._places.get(name), stays, self._mode))
        self._written.append(layer)

    def digest(self, layer: int) -> str:
        """Hex sha256 of a decoder layer as it lies in the shards that are being written; read once."""
        if layer not in self._digests:
            digest = hashlib.sha256()
            for name in self._layer(layer):
                writer = self._writers.get(self.tensors[name].file)
                if writer is not None:
                    for chunk in StoredRows(writer.path, name, writer.place(name)).chunks():
                        digest.update(chunk.numpy().data)
            self._digests[layer] = digest.hexdigest()
        return self._digests[layer]

    def write_rest(self, tell: Callable[[int], None] = lambda count: None) -> None:
        """Write all that is not written yet, from the source: embedding, norms, head, whole unchanged shards.

        Args:
            tell: told the bytes of each.

        Raises:
            ValueError: if a matrix that changes was never given.
        """
        for file in self._source.weight_files:
            names = self._of_file(file)
            if names and file not in self._writers:
                copy_file(self._source.folder / file, self._out / file)
                self._missing.difference_update(names)
            for name in names:
                if name in self._missing:
                    self._write(name, None)
                tell(self._source.tensors[name].size_bytes)

    def write_outside_layers(self) -> None:
        """Write the tensors that are no decoder layer's, embedding and head: at any time, as no decision changes them."""
        for name in self.tensors:
            if self._source.family.layer_of(name) is None:
                self._write(name, None)

    def sync(self) -> None:
        """Make durable what was written so far."""
        written = list(self._written)
        for writer in self._writers.values():
            writer.sync()
        self.durable = written

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
                (self._out / name).parent.mkdir(exist_ok=True)
                copy_file(self._source.folder / name, self._out / name)
        self._write_config_code()
        Checkpoint.open(self._out).check_shapes()

    def abandon(self) -> None:
        """Close the shards as they are, to be resumed or removed."""
        for writer in self._writers.values():
            writer.__exit__(InterruptedError, None, None)

    def _layer(self, layer: int) -> list[str]:
        return [name for name in self.tensors if self._source.family.layer_of(name) == layer]

    def _write(self, name: str, tensor: torch.Tensor | None) -> None:
        info = self._source.tensors[name]
        writer = self._writers.get(info.file)
        if writer is None:
            return  # its shard is copied whole, with the rest
        if tensor is not None:
            writer.write(name, tensor)
        elif name in self._places:
            raise ValueError(f"{name} changes, and was not given")
        else:
            writer.copy(name, self._source.folder / info.file, info)
        self._missing.discard(name)

    def _write_config(self) -> None:
        """config.json with what changes; byte for byte the source's where nothing does."""
        source = self._source.folder / "config.json"
        if self._changes:
            write_json(self._out / "config.json", {**self._source.config, **self._changes})
        else:
            copy_file(source, self._out / "config.json")

    def _write_config_code(self) -> None:
        """The code that config.json names, if the source lacks it: vLLM knows no other way to read it."""
        code, named = self._source.family.config_code, self._source.config.get("auto_map")
        if not self._changes or code is None or not isinstance(named, dict):
            return
        file = str(named.get("AutoConfig", "")).partition(".")[0] + ".py"
        if file == code.name and not (self._out / file).exists():
            copy_file(code, self._out / file)

    def _write_index(self) -> None:
        source = self._source.folder / INDEX_NAME
        if not source.is_file():
            return
        index = read_json(source)
        if not self._changes and index["weight_map"].keys() <= self.tensors.keys():
            copy_file(source, self._out / INDEX_NAME)
            return
        metadata = {**index.get("metadata", {})}
        metadata.pop("total_parameters", None)
        metadata["total_size"] = sum(
            prod(self.shape(name)) * info.dtype.itemsize for name, info in self.tensors.items()
        )
        files = {name: file for name, file in index["weight_map"].items() if name in self.tensors}
        write_json(self._out / INDEX_NAME, {**index, "metadata": metadata, "weight_map": files})


def changing_tensors(checkpoint: Checkpoint, changes: Mapping[str, Any]) -> dict[str, Placed]:
    """Every feed-forward matrix, and where the number of experts changes, all that has a row for each of them."""
    family = checkpoint.family
    drops = family.experts is not None and bool(changes.keys() & set(family.experts.count_keys))
    return {
        name: placed
        for name, placed in family.names(checkpoint.config).items()
        if name in checkpoint.tensors
        and (placed.weight.block is not None or (drops and "experts" in placed.weight.shape))
    }


def pruned_tensor(
    checkpoint: Checkpoint, place: Placed | None, stays: Stays, mode: str
) -> torch.Tensor | None:
    """What a tensor of the pruned model is; None where it is the source's.

    Args:
        checkpoint: the source.
        place: of the tensor in the pruned model; None for one that never changes.
        stays: what of its layer stays.
        mode: `physical` slices, `mask` zeroes.

    Raises:
        CameraError: if the source's matrix holds NaN or infinity.
    """
    if place is None:
        return None
    if place.weight.block is None:
        tensor = checkpoint.read_finite(place.name)
        assert stays.kept_E is not None
        return tensor.index_select(place.weight.shape.index("experts"), stays.kept_E)
    expert = place.expert
    if expert is not None and stays.kept_E is not None:
        expert = int(stays.kept_E[expert])
    name = place._replace(expert=expert).name
    label = "shared" if place.weight.block == "shared" else "" if expert is None else f"experts.{expert}"
    dimension = 1 if place.weight.role == "down" else 0
    kept_K = rows_of(place.weight.role, stays.kept[label], checkpoint.ffn_width)
    return pruned_matrix(checkpoint, name, dimension, kept_K, mode, stays.matrices.get(name))


def pruned_matrix(
    checkpoint: Checkpoint,
    name: str,
    dimension: int,
    kept_K: torch.Tensor,
    mode: str,
    own: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gate [F, H], up [F, H], both of them [2F, H] or down [H, F] of a block without the other channels.

    Args:
        checkpoint: the source.
        name: Hugging Face name of the matrix.
        dimension: that the channels are.
        kept_K: int64 [K], the rows or columns of the channels that stay.
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
    tensors: Callable[[str], torch.Tensor | None],
    tell: Callable[[int], None],
) -> None:
    """Read every tensor back and hold it against the one meant: the given one, or the source's.

    It streams, and maps nothing: pages of a map that were looked at count as memory of this process.

    Args:
        source: the unpruned model.
        written: the pruned model.
        tensors: gives the changed tensor of a name, or None.
        tell: told the bytes of each tensor.

    Raises:
        CameraError: naming the tensor that differs.
    """
    for name, info in written.tensors.items():
        meant = tensors(name)
        if meant is None:
            same = info.shape == source.tensors[name].shape and all(
                map(torch.equal, written.rows(name).chunks(), source.rows(name).chunks())
            )
        else:
            raw = (
                meant.contiguous().reshape(-1).view(torch.uint8)
            )  # so that NaN equals NaN and −0 does not equal 0
            same = info.size_bytes == len(raw) and all(
                map(torch.equal, written.rows(name).chunks(), raw.split(CHUNK_BYTES))
            )
        if not same:
            raise CameraError(
                f"{written.folder}: {name} does not read back as it was written; check the disk and run again"
            )
        tell(source.tensors[name].size_bytes)
