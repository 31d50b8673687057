"""Pack a checkpoint's tensors, one at a time, into shards that a killed run finds again."""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import SafetensorsWriter
from camera.digests import digest_file, digest_json
from camera.errors import CameraError
from camera.files import atomic_file, refuse_occupied, write_json
from camera.formats import blocks
from camera.formats.quantized_model import (
    SUMMARY_NAME,
    QuantizeReport,
    ShardRecord,
    TensorRecord,
    packed_shape,
    parse_report,
)
from camera.options import BlockType, QuantizeOptions
from camera.progress import Progress, silent
from camera.registry import BLOCK_FORMATS

_PARTIAL_NAME = "quantized.partial.json"
_REST = "rest.safetensors"
_SAMPLE = 2048  # weights of each tensor that go into the source's digest
_Finished = dict[str, tuple[ShardRecord, list[TensorRecord]]]


@dataclass(frozen=True)
class PlannedTensor:
    """What a tensor will be stored as."""

    name: str
    shape: tuple[int, ...]
    type: BlockType
    fallback: str | None
    """Why it is not of the type asked for; None if it is."""


@dataclass(frozen=True)
class Packed:
    """A tensor's bytes."""

    data: np.ndarray
    """uint8 [rows, bytes per row]."""
    weighted_error: float | None = None
    """See `TensorRecord.weighted_error`."""
    squares: blocks.Squares | None = None
    """What storing lost, where packing has measured it on its way."""


class Packer(Protocol):
    """Where the bytes of planned tensors come from."""

    @property
    def source(self) -> str | None:
        """Digest of what decides the bytes beside the checkpoint and the options; None if nothing does."""

    def pack(self, tensor: PlannedTensor, weight: torch.Tensor, name: str) -> Packed:
        """The bytes of one tensor.

        Tensors are asked for shard by shard: decoder layers in order, then the rest; those of shards that an
        earlier run has finished are left out.

        Args:
            tensor: what it is to be stored as.
            weight: its numbers.
            name: what to call it in messages.
        """


class RoundToNearest:
    """Each tensor alone, as llama.cpp's own quantisation without an importance matrix."""

    source = None

    def pack(self, tensor: PlannedTensor, weight: torch.Tensor, name: str) -> Packed:
        data, squares = blocks.quantize_measured(weight, tensor.type, name=name)
        return Packed(data, squares=squares)


def plan_types(checkpoint: Checkpoint, options: QuantizeOptions) -> list[PlannedTensor]:
    """What every tensor will be stored as, in the checkpoint's order.

    Vectors stay f32. A matrix is what the last matching override says, else what the options say for the
    embedding and the output head, else `options.type`; where its rows are no multiple of the block, the next
    finer type that holds them. A tied output head is not stored.

    Raises:
        CameraError: if an override matches no matrix, or a tensor is neither vector nor matrix.
    """
    plan = []
    unused = set(options.overrides)
    for name, info in checkpoint.needed.items():
        if checkpoint.tied and name == checkpoint.family.name("head"):
            continue
        if len(info.shape) not in (1, 2):
            raise CameraError(
                f"{checkpoint.folder}: {name} has shape {list(info.shape)}: only vectors and matrices are stored"
            )
        if len(info.shape) == 1:
            plan.append(PlannedTensor(name, info.shape, "f32", None))
            continue
        wanted = asked_for(checkpoint, options, name) or options.type
        for pattern, type in options.overrides.items():
            if fnmatch(name, pattern):
                wanted = type
                unused.discard(pattern)
        plan.append(_fit(name, info.shape, wanted))
    if unused:
        raise CameraError(f"quantize.overrides: {min(unused)!r} matches no matrix of {checkpoint.folder}")
    return plan


def asked_for(checkpoint: Checkpoint, options: QuantizeOptions, name: str) -> BlockType | None:
    """The type that the options give for the embedding or the output head by itself."""
    if name == checkpoint.embedding:
        return options.embedding_type
    return options.output_type if name == checkpoint.head else None


def quantize_checkpoint(
    checkpoint: Checkpoint,
    out: Path,
    options: QuantizeOptions,
    progress: Progress = silent,
    packer: Packer | None = None,
) -> QuantizeReport:
    """Write a folder with every tensor packed, from which `convert_to_gguf` needs nothing else.

    One shard for each decoder layer and one for the rest; each appears whole or not at all. A run into a
    folder that an equal run left unfinished (or that has lost a shard since) makes only what is missing.
    Peak memory is one tensor and its packed form.

    Args:
        checkpoint: the source; its config, generation config and tokenizer are copied.
        out: the folder to write.
        options: types; see `plan_types` for the rules.
        progress: told the tensors done and in all.
        packer: makes the bytes; the default rounds to the nearest. `camera.quantization` has the calibrated ones.

    Raises:
        CameraError: if the options ask for a method that needs calibration and no packer is given; if a tensor
            holds NaN, infinity or a value too large for its type; if `out` holds
            anything but an equal run's work.
    """
    if packer is None:
        if options.method != "rtn":
            raise CameraError(
                f"quantize.method: {options.method} needs calibration: give tokens or an imatrix"
            )
        packer = RoundToNearest()
    plan = plan_types(checkpoint, options)
    source = _source_digest(checkpoint, options, packer)
    finished = _resume(out, options, source)
    done = 0
    for file, planned in _shards(checkpoint, plan).items():
        if file not in finished:
            records = _write_shard(checkpoint, out / file, planned, packer, progress, done, len(plan))
            shard = ShardRecord(file=file, size=(out / file).stat().st_size, sha256=digest_file(out / file))
            finished[file] = shard, records
            _write_report(out / _PARTIAL_NAME, options, source, finished)
        done += len(planned)
        progress(done, len(plan))
    for name in _side_files(checkpoint):
        with atomic_file(out / name) as temporary:
            shutil.copyfile(checkpoint.folder / name, temporary)
    report = _write_report(out / SUMMARY_NAME, options, source, finished)
    (out / _PARTIAL_NAME).unlink()
    return report


def layer_file(layer: int) -> str:
    """Name of the shard that holds a decoder layer's tensors."""
    return f"layer-{layer:05d}.safetensors"


def _fit(name: str, shape: tuple[int, ...], wanted: BlockType) -> PlannedTensor:
    form = BLOCK_FORMATS[wanted]
    while shape[-1] % form.block_length:
        form = BLOCK_FORMATS[form.fallback or "f32"]
    if form.name == wanted:
        return PlannedTensor(name, shape, wanted, None)
    length = BLOCK_FORMATS[wanted].block_length
    return PlannedTensor(
        name, shape, form.name, f"rows of {shape[-1]} weights are no multiple of {wanted}'s block of {length}"
    )


def _shards(checkpoint: Checkpoint, plan: Iterable[PlannedTensor]) -> dict[str, list[PlannedTensor]]:
    """The planned tensors by the file that they go into, decoder layers first."""
    by_prefix = {
        checkpoint.family.layer_prefix(layer): layer_file(layer) for layer in range(checkpoint.layer_count)
    }
    shards: dict[str, list[PlannedTensor]] = {file: [] for file in (*by_prefix.values(), _REST)}
    for planned in plan:
        files = (file for prefix, file in by_prefix.items() if planned.name.startswith(prefix))
        shards[next(files, _REST)].append(planned)
    return shards


def _write_shard(
    checkpoint: Checkpoint,
    path: Path,
    planned: list[PlannedTensor],
    packer: Packer,
    progress: Progress,
    done: int,
    total: int,
) -> list[TensorRecord]:
    records = []
    layout = {tensor.name: (torch.uint8, packed_shape(tensor.type, tensor.shape)) for tensor in planned}
    with atomic_file(path) as temporary, SafetensorsWriter(temporary, layout) as writer:
        for tensor in planned:
            weight = checkpoint.read(tensor.name)
            packed = packer.pack(tensor, weight, f"{checkpoint.folder}: {tensor.name}")
            writer.write(tensor.name, torch.from_numpy(packed.data))
            rms, relative_error = _errors(weight, packed, tensor.type)
            records.append(
                TensorRecord(
                    name=tensor.name,
                    type=tensor.type,
                    shape=tensor.shape,
                    file=path.name,
                    bits_per_weight=BLOCK_FORMATS[tensor.type].bits_per_weight,
                    rms=rms,
                    relative_error=relative_error,
                    weighted_error=None
                    if packed.weighted_error is None
                    else _six_digits(packed.weighted_error),
                    fallback=tensor.fallback,
                )
            )
            progress(done + len(records), total)
    return records


def _errors(weight: torch.Tensor, packed: Packed, type: BlockType) -> tuple[float, float]:
    """RMS of a tensor, and RMS of (stored − original) over it; six digits, which any summation order gives."""
    squares = packed.squares or blocks.measure(weight, packed.data, type)
    rms = (squares.power / weight.numel()) ** 0.5
    return _six_digits(rms), _six_digits((squares.noise / squares.power) ** 0.5 if squares.power else 0.0)


def _six_digits(number: float) -> float:
    return float(f"{number:.6g}")


def _write_report(path: Path, options: QuantizeOptions, source: str, finished: _Finished) -> QuantizeReport:
    shards = [shard for _, (shard, _) in sorted(finished.items())]
    records = [record for _, (_, shard_records) in sorted(finished.items()) for record in shard_records]
    parameters = sum(record.parameters for record in records)
    size = sum(prod(packed_shape(record.type, record.shape)) for record in records)
    matrices = [record for record in records if len(record.shape) == 2]
    power = sum(record.parameters * record.rms**2 for record in matrices)
    noise = sum(record.parameters * (record.rms * record.relative_error) ** 2 for record in matrices)
    report = QuantizeReport(
        type=options.type,
        tensors=tuple(records),
        shards=tuple(shards),
        source=source,
        parameters=parameters,
        bytes=size,
        bits_per_weight=8 * size / parameters if parameters else 0.0,
        relative_error=_six_digits((noise / power) ** 0.5 if power else 0.0),
        target_bpw=options.target_bpw,
    )
    write_json(path, report.model_dump(mode="json"))
    return report


def _source_digest(checkpoint: Checkpoint, options: QuantizeOptions, packer: Packer) -> str:
    """What tells two sources apart without reading them whole: their plan, and the start of every tensor."""
    samples = {}
    for name, info in checkpoint.needed.items():
        start = checkpoint.read(name).reshape(-1)[:_SAMPLE].contiguous()
        samples[name] = [str(info.dtype), list(info.shape), start.view(torch.uint8).numpy().tobytes().hex()]
    described = {"config": checkpoint.config, "samples": samples, "options": options.identity()}
    return digest_json(described if packer.source is None else {**described, "calibration": packer.source})


def _side_files(checkpoint: Checkpoint) -> list[str]:
    """The config and what else a converter reads."""
    wanted = ("config.json", "generation_config.json", *checkpoint.tokenizer_files)
    return [name for name in wanted if (checkpoint.folder / name).is_file()]


def _resume(out: Path, options: QuantizeOptions, source: str) -> _Finished:
    """Make `out` ready to be written to; the shards in it that are whole, with their tensors' records.

    Raises:
        CameraError: if it holds something else than an equal run's work.
    """
    out.mkdir(parents=True, exist_ok=True)
    partial = out / _PARTIAL_NAME
    if (out / SUMMARY_NAME).is_file():  # finished once: unfinished until its shards are seen to be there
        (out / SUMMARY_NAME).replace(partial)
    for leftover in out.glob(".*.tmp"):
        leftover.unlink()
    finished: _Finished = {}
    if partial.is_file():
        report = parse_report(partial)
        if report.source != source:
            raise CameraError(
                f"{out} holds the work of another checkpoint or of other options: choose another output "
                "folder, or remove it"
            )
        for shard in report.shards:
            path = out / shard.file
            if path.is_file() and path.stat().st_size == shard.size and digest_file(path) == shard.sha256:
                records = [record for record in report.tensors if record.file == shard.file]
                finished[shard.file] = shard, records
    else:
        refuse_occupied(out)
        _write_report(partial, options, source, finished)
    return finished
