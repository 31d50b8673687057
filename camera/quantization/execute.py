"""Pack a checkpoint's tensors, one at a time, into a folder of shards; a run that was killed is resumed."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import SafetensorsWriter
from camera.digests import digest_file, digest_json
from camera.errors import MISREAD, CameraError
from camera.files import atomic_file, copy_file, read_json, refuse_occupied, write_json
from camera.formats.blocks import Squares
from camera.formats.quantized_model import (
    SUMMARY_NAME,
    QuantizeReport,
    ShardRecord,
    TensorRecord,
    layer_file,
    packed_shape,
)
from camera.held import Held, holding, note
from camera.options import QuantizeOptions
from camera.progress import Progress, silent
from camera.quantization.finishing import Finishing
from camera.quantization.imatrix import Imatrix
from camera.quantization.method import Calibration, Method, Stored
from camera.quantization.plan import PlannedTensor, choose_types, concerns, plan_types
from camera.registry import BLOCK_FORMATS, QUANTIZATION_METHODS

_log = logging.getLogger(__name__)
_PARTIAL_NAME = "quantized.partial.json"
_REST = "rest.safetensors"
_SAMPLE = 2048  # weights of each tensor that go into the source's digest
_Finished = dict[str, tuple[ShardRecord, list[TensorRecord]]]


def quantize_checkpoint(
    checkpoint: Checkpoint,
    out: Path,
    options: QuantizeOptions,
    tokens_ST: torch.Tensor | None = None,
    imatrix: Imatrix | None = None,
    progress: Progress = silent,
) -> QuantizeReport:
    """Write a folder with every tensor packed, from which `convert_to_gguf` needs nothing else.

    One shard for each decoder layer and one for the rest; each appears whole or not at all, while the next is packed. A run into a
    folder that an equal run left unfinished (or that has lost a shard since) makes only what is missing.
    Tensors are read, packed and written by rows: peak memory is a few megabytes for each thread, whatever their size, and
    what the method needs to calibrate; `gptq` has one whole matrix and its packed form as well.

    Args:
        checkpoint: the source; its config, generation config and tokenizer are copied.
        out: the folder to write.
        options: types (see `plan_types` for the rules), method, and how to calibrate.
        tokens_ST: int64 [samples, tokens], to calibrate on; `rtn` without a target needs none.
        imatrix: in place of tokens, for a target and for methods that read it.
        progress: called with the tensors done, and all.

    Raises:
        CameraError: if the method or the target lacks what it calibrates on; if no types come to the target; if a
            tensor holds NaN, infinity or a value too large for its type, or the model computes such; if `out` holds
            anything but an equal run's work.
    """
    calibration = Calibration(checkpoint, options, tokens_ST, imatrix)
    calibration.check()
    if options.target_bpw is not None:
        options = choose_types(checkpoint, options, calibration.imatrix)
    method = QUANTIZATION_METHODS[options.method](checkpoint, options, out, calibration)
    plan = plan_types(checkpoint, options)
    for concern in concerns(checkpoint, plan):
        _log.warning("%s", concern)
    source = _source_digest(checkpoint, options, method.source)
    steady = note(checkpoint.folder, checkpoint.files)
    finished = _resume(out, options, source, steady)

    def record(shard: ShardRecord, records: list[TensorRecord]) -> None:
        finished[shard.file] = shard, records
        _write_partial(out, _report(options, source, finished), steady)

    done = 0
    with holding(steady), Finishing(record) as finishing:
        method.settle = finishing.wait
        for file, planned in _shards(checkpoint, plan).items():
            if file not in finished:
                with ExitStack() as writing:
                    temporary = writing.enter_context(atomic_file(out / file))
                    records = []
                    for tensor, stored in _write_shard(checkpoint, temporary, planned, method):
                        records.append(_record_of(tensor, stored, file))
                        progress(done + len(records), len(plan))
                    finishing.add(out / file, writing, records)
            done += len(planned)
            progress(done, len(plan))
    for name in _side_files(checkpoint):
        (out / name).parent.mkdir(exist_ok=True)
        with atomic_file(out / name) as temporary:
            copy_file(checkpoint.folder / name, temporary)
    if read_json(out / "config.json") != checkpoint.config:
        write_json(out / "config.json", checkpoint.config)
    steady.check()
    report = _report(options, source, finished)
    write_json(out / SUMMARY_NAME, report.model_dump(mode="json"))
    (out / _PARTIAL_NAME).unlink()
    return report


def _shards(checkpoint: Checkpoint, plan: Iterable[PlannedTensor]) -> dict[str, list[PlannedTensor]]:
    """The planned tensors by the file that they go into, decoder layers first."""
    files = [layer_file(layer) for layer in range(checkpoint.layer_count)]
    shards: dict[str, list[PlannedTensor]] = {file: [] for file in (*files, _REST)}
    for planned in plan:
        layer = checkpoint.family.layer_of(planned.name)
        shards[_REST if layer is None else files[layer]].append(planned)
    return shards


def _write_shard(
    checkpoint: Checkpoint, path: Path, planned: list[PlannedTensor], method: Method
) -> Iterator[tuple[PlannedTensor, Stored]]:
    """Write the tensors of a shard one after the other; gives each when it is written."""
    layout = {tensor.name: (torch.uint8, packed_shape(tensor.type, tensor.shape)) for tensor in planned}
    with SafetensorsWriter(path, layout) as writer:
        for tensor in planned:
            checkpoint.read_ahead([tensor.name])
            rows = checkpoint.rows(tensor.name)
            put = partial(_put, writer, tensor.name)
            yield tensor, method.store(tensor, rows, put, f"{checkpoint.folder}: {tensor.name}")


def _put(writer: SafetensorsWriter, name: str, start: int, data: np.ndarray) -> None:
    writer.write_rows(name, start, torch.from_numpy(data))


def _record_of(tensor: PlannedTensor, stored: Stored, file: str) -> TensorRecord:
    rms, relative_error = _errors(tensor, stored.squares)
    weighted = stored.weighted_error
    return TensorRecord(
        name=tensor.name,
        type=tensor.type,
        shape=tensor.shape,
        file=file,
        bits_per_weight=BLOCK_FORMATS[tensor.type].bits_per_weight,
        rms=rms,
        relative_error=relative_error,
        weighted_error=None if weighted is None else _six_digits(weighted),
        fallback=tensor.fallback,
        few_tokens=stored.few_tokens,
    )


def _errors(tensor: PlannedTensor, squares: Squares) -> tuple[float, float]:
    """RMS of a tensor, and RMS of (stored − original) over it; six digits, which any summation order gives."""
    rms = (squares.power / prod(tensor.shape)) ** 0.5
    return _six_digits(rms), _six_digits((squares.noise / squares.power) ** 0.5 if squares.power else 0.0)


def _six_digits(number: float) -> float:
    return float(f"{number:.6g}")


def _report(options: QuantizeOptions, source: str, finished: _Finished) -> QuantizeReport:
    shards = [shard for _, (shard, _) in sorted(finished.items())]
    records = [record for _, (_, shard_records) in sorted(finished.items()) for record in shard_records]
    parameters = sum(record.parameters for record in records)
    size = sum(prod(packed_shape(record.type, record.shape)) for record in records)
    matrices = [record for record in records if len(record.shape) == 2]
    power = sum(record.parameters * record.rms**2 for record in matrices)
    noise = sum(record.parameters * (record.rms * record.relative_error) ** 2 for record in matrices)
    return QuantizeReport(
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


def _write_partial(out: Path, report: QuantizeReport, steady: Held) -> None:
    """What an unfinished folder holds, and of which files it is made, with a digest of both."""
    content = {"report": report.model_dump(mode="json"), "files": steady.mark}
    write_json(out / _PARTIAL_NAME, {**content, "checksum": digest_json(content)})


def _read_partial(out: Path, steady: Held) -> QuantizeReport | None:
    """What `_write_partial` wrote; None if it was changed since, or is of files that were."""
    try:
        content = read_json(out / _PARTIAL_NAME)
        if content.pop("checksum") == digest_json(content) and content["files"] == steady.mark:
            return QuantizeReport.model_validate(content["report"])
    except (CameraError, ValueError, *MISREAD):
        pass
    return None


def _source_digest(checkpoint: Checkpoint, options: QuantizeOptions, calibrated_on: str | None) -> str:
    """What tells two sources apart without reading them whole: their plan, and the start of every tensor."""
    samples = {}
    for name, info in checkpoint.needed.items():
        start = checkpoint.start(name, _SAMPLE)
        samples[name] = [str(info.dtype), list(info.shape), start.view(torch.uint8).numpy().tobytes().hex()]
    described = {"config": checkpoint.config, "samples": samples, "options": options.identity()}
    return digest_json(described if calibrated_on is None else {**described, "calibration": calibrated_on})


def _side_files(checkpoint: Checkpoint) -> list[str]:
    """The config and what else a converter reads."""
    wanted = ("config.json", "generation_config.json", "README.md", *checkpoint.tokenizer_files)
    return [name for name in wanted if (checkpoint.folder / name).is_file()]


def _resume(out: Path, options: QuantizeOptions, source: str, steady: Held) -> _Finished:
    """Make `out` ready to be written to; the shards in it that are whole, with their tensors' records.

    Raises:
        CameraError: if it holds something else than an equal run's work.
    """
    out.mkdir(parents=True, exist_ok=True)
    partial = out / _PARTIAL_NAME
    for leftover in out.glob(".*.tmp"):
        leftover.unlink()
    finished: _Finished = {}
    if (out / SUMMARY_NAME).is_file():  # finished once: unfinished until its shards are seen to be there
        report: QuantizeReport | None = QuantizeReport.read(out / SUMMARY_NAME, "quantize again")
    elif partial.is_file():
        report = _read_partial(out, steady)
        if report is None:
            _log.warning("%s: what an earlier run left is not of these files, or damaged: begun again", out)
            report = _report(options, source, finished)
    else:
        refuse_occupied(out)
        report = None
    if report is not None:
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
    _write_partial(out, _report(options, source, finished), steady)
    (out / SUMMARY_NAME).unlink(missing_ok=True)
    return finished
