"""A folder of packed tensors, as `quantize` writes it and `convert`, evaluation and reports read it."""

import re
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open

from camera.checkpoints.safetensors_file import TensorInfo, read_header
from camera.checkpoints.trust import is_plain_name, refuse_outside_links
from camera.checkpoints.weights import QUANTIZED_NAME, is_checkpoint
from camera.errors import CameraError, understood
from camera.files import read_json
from camera.formats import blocks
from camera.models import Family, family_of
from camera.models.defaults import completed
from camera.models.limits import check_config, check_counts, check_shapes
from camera.options import BlockType
from camera.registry import BLOCK_FORMATS
from camera.results import Result

SUMMARY_NAME = QUANTIZED_NAME
_ONE_EXPERT = re.compile(r"(.*\.experts)\.\d+\.")
_MOST_EXTENT = 1 << 31
_EXPERT, _NUMBER = ".experts.", re.compile(r"\.\d+\.")


class TensorRecord(Result):
    """What became of one tensor."""

    name: str
    """Its Hugging Face name."""
    type: BlockType
    shape: tuple[int, ...]
    file: str
    """The shard that holds its bytes: uint8 [rows, bytes per row], a vector as one row."""
    bits_per_weight: float
    rms: float
    """Of the original."""
    relative_error: float
    """RMS of (stored − original) over RMS of the original; 0 for a tensor of zeros."""
    weighted_error: float | None = Field(default=None, exclude_if=lambda value: value is None)
    """The same of the layer's output on the calibration tokens, as far as the method knows it: by the second moment
    of each input (`search`), or of all pairs of inputs (`gptq`). None if nothing was measured."""
    fallback: str | None = None
    """Why it is not of the type asked for; None if it is."""
    few_tokens: int | None = Field(default=None, exclude_if=lambda value: value is None)
    """How many calibration tokens came to an expert, where they were too few for the method and the scales were searched
    without them; None else."""

    @property
    def parameters(self) -> int:
        return prod(self.shape)


class ShardRecord(Result):
    """A finished shard."""

    file: str
    size: int
    sha256: str


class QuantizeReport(Result):
    """What `quantized.json` holds."""

    type: BlockType
    """Of the matrices, where nothing else was asked for."""
    tensors: tuple[TensorRecord, ...]
    shards: tuple[ShardRecord, ...]
    source: str
    """Digest of the source's config, tensor list and a sample of each tensor, and of the options."""
    parameters: int
    bytes: int
    """Of all packed tensors, without headers."""
    bits_per_weight: float
    relative_error: float
    """RMS over all matrices together of (stored − original), over RMS of the originals."""
    target_bpw: float | None = Field(default=None, exclude_if=lambda value: value is None)
    """The bits per weight for which types were chosen by tensor; None if they were not."""

    @property
    def finer(self) -> list[TensorRecord]:
        """The matrices that are of more bits than `type`, and not because their rows would not divide, or because they are
        kept exactly."""
        usual = BLOCK_FORMATS[self.type].bits_per_weight
        return [
            record
            for record in self.tensors
            if len(record.shape) == 2
            and record.bits_per_weight > usual
            and not record.fallback
            and record.type != "f32"
        ]

    @property
    def finer_lines(self) -> dict[str, str]:
        """Their types by name; the experts of a layer, which have one type, are one line."""
        return {_ONE_EXPERT.sub(r"\1.*.", record.name): record.type for record in self.finer}

    @property
    def few_tokens(self) -> tuple[int, int]:
        """How many experts too few calibration tokens came to, and how many experts there are."""
        of_all = {found[0]: False for record in self.tensors if (found := _ONE_EXPERT.match(record.name))}
        for record in self.tensors:
            if record.few_tokens is not None and (found := _ONE_EXPERT.match(record.name)):
                of_all[found[0]] = True
        return sum(of_all.values()), len(of_all)

    @property
    def fallbacks(self) -> list[TensorRecord]:
        """The tensors that are not of the type asked for."""
        return [record for record in self.tensors if record.fallback]

    @property
    def fallback_lines(self) -> list[tuple[str, str, str]]:
        """Name, type and reason of them, each once; experts that share all three but for their numbers are one line."""
        lines: dict[tuple[str, str, str], None] = {}
        for record in self.fallbacks:
            expert = _EXPERT in record.name
            name = _NUMBER.sub(".*.", record.name) if expert else record.name
            lines[name, str(record.type), str(record.fallback)] = None
        return list(lines)


@dataclass(frozen=True)
class QuantizedModel:
    """An open folder; bytes are read when asked for."""

    folder: Path
    config: dict[str, Any]
    """The source's config.json, every key kept, with what it leaves to transformers' config class."""
    family: Family
    report: QuantizeReport
    _headers: dict[str, dict[str, TensorInfo]] = field(default_factory=dict, init=False, repr=False)
    """Of the shards that were asked for an offset: thousands of experts lie in one."""

    @classmethod
    def open(cls, folder: Path | str) -> "QuantizedModel":
        """Read the summary and the shards' headers.

        Raises:
            CameraError: if the folder is unfinished or holds a checkpoint too; if a shard is missing, truncated, elsewhere or
                does not hold what the summary says; or if the config is of another model.
        """
        folder = Path(folder)
        if not (folder / SUMMARY_NAME).is_file():
            raise CameraError(
                f"{folder} holds no finished quantised model ({SUMMARY_NAME}): quantize into it (again)"
            )
        refuse_outside_links(folder)
        if is_checkpoint(folder):
            raise CameraError(
                f"{folder} holds a checkpoint and a quantised model ({SUMMARY_NAME}), and which of them is meant cannot be told: "
                f"move {SUMMARY_NAME} and its shards, or the checkpoint's files, to another folder"
            )
        report = QuantizeReport.read(folder / SUMMARY_NAME, "quantize again")
        _check_records(folder, report)
        where = str(folder / "config.json")
        config = check_config(read_json(folder / "config.json"), where)
        family = family_of(config, where)
        with understood(where):
            check_counts(family, config, len(report.tensors), where)
            config = completed(family, config, where, len(report.tensors))
            shapes = {record.name: record.shape for record in report.tensors}
            check_shapes(family, config, shapes, str(folder))
        return cls(folder, config, family, report)

    @cached_property
    def tensors(self) -> dict[str, TensorRecord]:
        """Every tensor's record by its Hugging Face name."""
        return {record.name: record for record in self.report.tensors}

    def packed(self, name: str) -> np.ndarray:
        """A tensor's bytes: uint8 [rows, bytes per row], mapped from its shard.

        Raises:
            CameraError: if there is no such tensor or its shard cannot be read.
        """
        path = self.folder / self._record(name).file
        try:
            with safe_open(path, framework="pt") as file:
                packed: np.ndarray = file.get_tensor(name).numpy()
                return packed
        except (SafetensorError, OSError) as error:
            raise CameraError(f"{path} cannot be read ({name}): {error}; quantize again") from None

    def stored(self, name: str) -> tuple[Path, int]:
        """The file that holds the bytes of `packed(name)`, and where in it they start.

        Raises:
            CameraError: if there is no such tensor or its shard is damaged.
        """
        file = self._record(name).file
        if file not in self._headers:
            self._headers[file] = read_header(self.folder / file)
        return self.folder / file, self._headers[file][name].offset

    def dequantize(self, name: str) -> torch.Tensor:
        """A tensor's numbers as stored: float32, of its shape.

        Raises:
            CameraError: if there is no such tensor or its shard cannot be read.
        """
        record = self._record(name)
        return torch.from_numpy(blocks.dequantize(self.packed(name), record.type, record.shape[-1])).reshape(
            record.shape
        )

    def state_dict(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """The numbers of all tensors whose names start so; float32, so mind the memory of a whole model."""
        return {name: self.dequantize(name) for name in self.tensors if name.startswith(prefix)}

    def _record(self, name: str) -> TensorRecord:
        if name not in self.tensors:
            raise CameraError(f"{self.folder} has no tensor {name}")
        return self.tensors[name]


def _check_records(folder: Path, report: QuantizeReport) -> None:
    """Hold a summary, which anybody may have written, to the shards of its folder.

    Raises:
        CameraError: if it names files elsewhere, a tensor twice or one that no shard holds, or sizes that are not theirs.
    """
    summary = folder / SUMMARY_NAME
    records: dict[str, list[TensorRecord]] = {shard.file: [] for shard in report.shards}
    for file in records:
        if not is_plain_name(file):
            raise CameraError(f"{summary} names {file!r}, which is outside its folder: quantize again")
    seen = set()
    for record in report.tensors:
        if record.file not in records:
            raise CameraError(
                f"{summary}: {record.name} is in {record.file!r}, which is none of its shards: quantize again"
            )
        if record.name in seen:
            raise CameraError(f"{summary} has {record.name} twice: quantize again")
        if not (len(record.shape) in (1, 2) and all(0 < extent <= _MOST_EXTENT for extent in record.shape)):
            raise CameraError(f"{summary}: {record.name} has shape {list(record.shape)}: quantize again")
        if record.shape[-1] % BLOCK_FORMATS[record.type].block_length:
            raise CameraError(
                f"{summary}: {record.name} has rows of {record.shape[-1]}, which no blocks of {record.type} make: quantize again"
            )
        seen.add(record.name)
        records[record.file].append(record)
    for file, of_shard in records.items():
        headers = read_header(folder / file)
        for record in of_shard:
            expected = packed_shape(record.type, record.shape)
            info = headers.get(record.name)
            if info is None or (info.shape, info.dtype) != (expected, torch.uint8):
                found = None if info is None else info.shape
                raise CameraError(
                    f"{folder / file}: {record.name} has shape {found}, and {SUMMARY_NAME} says {expected}: quantize again"
                )


def packed_shape(type: BlockType, shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and bytes per row of a vector or matrix."""
    rows = shape[0] if len(shape) == 2 else 1
    return rows, BLOCK_FORMATS[type].row_bytes(shape[-1])


def layer_file(layer: int) -> str:
    """Name of the shard that holds a decoder layer's tensors."""
    return f"layer-{layer:05d}.safetensors"
