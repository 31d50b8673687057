"""From a folder of packed tensors to one GGUF file, and from a Q4_0_64 file to its Q4_0 twin."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from camera.digests import canonical_json
from camera.errors import CameraError
from camera.files import refuse_occupied
from camera.formats.cann import why_slow, why_wrong
from camera.formats.convertible import architecture, describe
from camera.formats.gguf_parser import BLOCK_TYPE_KEY, LINEAGE_KEY, TWIN_KEY
from camera.formats.gguf_reader import GgufFile, GgufTensor, is_q4_0_64, open_gguf
from camera.formats.gguf_tensors import output_tensors
from camera.formats.gguf_writer import OutputTensor, Segment, gguf_file, stream_tensors
from camera.formats.model_facts import model_facts
from camera.formats.model_keys import size_label
from camera.formats.quantized_model import QuantizedModel
from camera.formats.types.q4_0_64 import Q4_0_64
from camera.mapped import release_pages
from camera.progress import Progress, silent
from camera.registry import BLOCK_FORMATS

_log = logging.getLogger(__name__)
_QUANTIZATION_VERSION = 2  # ggml's, of the block types' layouts
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_PIECE_BYTES = 1 << 20
"""Of a tensor, in memory at once."""


def convert_to_gguf(
    quantized_folder: Path,
    out_file: Path,
    *,
    name: str,
    lineage: dict[str, Any] | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write a GGUF file with everything that llama.cpp needs: weights, tokenizer, chat template, keys.

    A Q4_0_64 matrix that the llama.cpp made for this type would compute wrongly is written as the Q4_0 that holds exactly
    the same numbers, and a warning says so.

    The same folder, name and lineage always give the same bytes. Peak memory is one packed tensor of the folder, so one matrix
    of one expert.

    Args:
        quantized_folder: what `quantize_checkpoint` wrote; nothing else is read.
        out_file: the file to write.
        name: `general.name`.
        lineage: what made the model; any JSON, kept in the file.
        progress: called with the tensors done, and all.

    Returns:
        `bytes`, `type`, `file_type`, `tensors` (how many of each type), `parameters`, `bits_per_weight`,
        `warnings` (sentences, which are logged too).

    Raises:
        CameraError: if the folder is unfinished or damaged, if its family, its tokenizer, a type or a config value has
            no counterpart in GGUF, or if `out_file` exists.
    """
    refuse_occupied(out_file)
    model = QuantizedModel.open(quantized_folder)
    with gguf_file(out_file, architecture(model)) as writer:
        writer.add_type(gguf.GGUFType.MODEL)
        facts = model_facts(model.folder)
        facts.name, facts.size_label = name, size_label(model)
        facts.set_gguf_meta_model(writer)
        warnings, computed = describe(writer, model, set(model.tensors))
        tensors, concerns = _for_cann(computed + output_tensors(model))
        warnings += concerns
        block_type = _block_type(tensors, model.report.type)
        writer.check(str(quantized_folder))
        if lineage is not None:
            writer.add_string(LINEAGE_KEY, canonical_json(lineage))
        _write_tensors(writer, tensors, block_type, progress)
    for warning in warnings:
        _log.warning("%s: %s", out_file.name, warning)
    return _summary(out_file, tensors, block_type, warnings)


def write_twin(gguf_path: Path, out_path: Path, progress: Progress = silent) -> dict[str, Any]:
    """Rewrite a Q4_0_64 file as the Q4_0 file that holds exactly the same numbers, for any stock llama.cpp.

    Returns:
        as `convert_to_gguf`.

    Raises:
        CameraError: if the file holds no Q4_0_64, is damaged, or `out_path` exists.
    """
    refuse_occupied(out_path)
    file = open_gguf(gguf_path)
    if not is_q4_0_64(file):
        raise CameraError(f"{gguf_path} holds no Q4_0_64: it needs no twin")
    tensors = _twins(file)
    with gguf_file(out_path, file.architecture) as writer:
        for key, value in file.metadata.items():
            if key == gguf.Keys.General.ALIGNMENT:
                writer.add_custom_alignment(value)
            elif key not in (gguf.Keys.General.ARCHITECTURE, *_TYPE_KEYS):
                kind, item_kind = file.value_types[key]
                writer.add_key_value(
                    key,
                    value,
                    gguf.GGUFValueType(kind),
                    None if item_kind is None else gguf.GGUFValueType(item_kind),
                )
        block_type = _block_type(tensors, "q4_0")
        _write_tensors(writer, tensors, block_type, progress, twin_of="q4_0_64")
    return _summary(out_path, tensors, block_type, [])


def _twins(file: GgufFile) -> list[OutputTensor]:
    """A file's tensors, those of Q4_0_64 as Q4_0."""
    tensors = []
    for tensor in file.tensors.values():
        if tensor.type not in BLOCK_FORMATS:
            raise CameraError(f"{file.path}: {tensor.name} is {tensor.type}, which is not written here")
        segment = Segment(partial(_read, tensor))
        written = OutputTensor(tensor.name, tensor.type, tensor.shape, (segment,))
        tensors.append(_as_q4_0(written) if tensor.type == Q4_0_64.name else _turned(written, np.asarray))
    return tensors


def _read(tensor: GgufTensor) -> list[np.ndarray]:
    return [tensor.data]


def _as_q4_0(tensor: OutputTensor) -> OutputTensor:
    """A tensor of Q4_0_64 in the Q4_0 that holds exactly the same numbers."""
    return replace(_turned(tensor, Q4_0_64().twin), type="q4_0")


def _turned(tensor: OutputTensor, turn: Callable[[np.ndarray], np.ndarray]) -> OutputTensor:
    """A tensor whose bytes are made of the given one's, a piece at a time."""
    segments = tuple(Segment(partial(_in_pieces, segment.read, turn)) for segment in tensor.segments)
    return replace(tensor, segments=segments)


def _in_pieces(
    read: Callable[[], Iterable[np.ndarray]], turn: Callable[[np.ndarray], np.ndarray]
) -> Iterator[np.ndarray]:
    for data in read():
        step = max(1, _PIECE_BYTES // max(1, data.shape[1]))
        for start in range(0, len(data), step):
            piece = data[start : start + step]
            yield turn(piece)
            release_pages(piece)


def _for_cann(tensors: list[OutputTensor]) -> tuple[list[OutputTensor], list[str]]:
    """The tensors of a file, of which those that an Ascend card would compute wrongly are exchanged; and what to know of
    it, where the file is for such a card."""
    if not any(tensor.type == Q4_0_64.name for tensor in tensors):
        return tensors, []
    head = any(tensor.name == _HEAD for tensor in tensors)
    written, concerns = [], []
    for tensor in tensors:
        if len(tensor.shape) > 1 and not (head and tensor.name == _EMBEDDING):  # of which rows are read
            if (why := why_wrong(tensor.type, tensor.shape[-2])) is not None:
                tensor = _as_q4_0(tensor)
                concerns.append(f"{tensor.name} is written as q4_0, which holds the same numbers: {why}")
            elif (why := why_slow(tensor.type)) is not None:
                concerns.append(f"{tensor.name} is {tensor.type}: {why}")
        written.append(tensor)
    return written, concerns


_TYPE_KEYS = (
    gguf.Keys.General.FILE_TYPE,
    gguf.Keys.General.QUANTIZATION_VERSION,
    BLOCK_TYPE_KEY,
    TWIN_KEY,
    *(form.marker.key for form in BLOCK_FORMATS.values() if form.marker),
)


def _write_tensors(
    writer: gguf.GGUFWriter,
    tensors: list[OutputTensor],
    block_type: str,
    progress: Progress,
    twin_of: str | None = None,
) -> None:
    """The keys that tell the types, and then all tensors."""
    writer.add_file_type(BLOCK_FORMATS[block_type].file_number)
    writer.add_quantization_version(_QUANTIZATION_VERSION)
    writer.add_string(BLOCK_TYPE_KEY, block_type)
    for type in sorted({tensor.type for tensor in tensors}):
        if (marker := BLOCK_FORMATS[type].marker) is not None:
            writer.add_string(marker.key, marker.value)
    if twin_of is not None:
        writer.add_string(TWIN_KEY, twin_of)
    for done, _ in enumerate(stream_tensors(writer, tensors), start=1):
        progress(done, len(tensors))


def _block_type(tensors: list[OutputTensor], wanted: str) -> str:
    """What the file calls itself: the type asked for, or what most bytes are where all tensors fell back."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        if len(tensor.shape) > 1:
            sizes[tensor.type] += tensor.size
    return wanted if wanted in sizes else sizes.most_common(1)[0][0]


def _summary(path: Path, tensors: list[OutputTensor], block_type: str, warnings: list[str]) -> dict[str, Any]:
    parameters = sum(prod(tensor.shape) for tensor in tensors)
    return {
        "bytes": path.stat().st_size,
        "type": block_type,
        "file_type": BLOCK_FORMATS[block_type].file_number,
        "tensors": dict(sorted(Counter(tensor.type for tensor in tensors).items())),
        "parameters": parameters,
        "bits_per_weight": 8 * sum(tensor.size for tensor in tensors) / parameters,
        "warnings": warnings,
    }
