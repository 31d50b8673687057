"""A model's tensors as a GGUF file has them, and back: rows of heads permuted, experts end to end, latent matrices in parts."""

from collections.abc import Sequence, Set
from functools import partial
from itertools import accumulate

import numpy as np

from camera.errors import CameraError
from camera.formats.gguf_writer import OutputTensor, Segment
from camera.formats.model_keys import Described
from camera.formats.quantized_model import QuantizedModel, TensorRecord
from camera.formats.rope import interleave
from camera.models import Placed, named_weights
from camera.registry import BLOCK_FORMATS


def refuse_strange(model: Described, names: Set[str]) -> None:
    """Refuse tensors that have no place in a GGUF file of the model's family."""
    if strange := names - named_weights(model.family, model.config).keys():
        raise CameraError(f"{model.folder}: {min(strange)} has no place in a GGUF file")


def output_tensors(model: QuantizedModel) -> list[OutputTensor]:
    """The model's tensors under their GGUF names, in the order of a file; reads none.

    Raises:
        CameraError: if a tensor that GGUF merges has experts missing or of several types.
    """
    weights = named_weights(model.family, model.config)
    tensors: list[OutputTensor] = []
    merged: dict[str, list[Placed]] = {}
    for name, placed in weights.items():
        if (record := model.tensors.get(name)) is None:
            continue
        if placed.expert is not None:
            merged.setdefault(placed.gguf, []).append(placed)
            if len(merged[placed.gguf]) == _expert_count(model):
                tensors.append(_merged(model, merged.pop(placed.gguf)))
        elif placed.weight.parts:
            tensors += _parts(model, placed, record)
        else:
            shape = record.shape[1:] if placed.weight.shape[0] == "1" else record.shape
            tensors.append(OutputTensor(placed.gguf, record.type, shape, (_segment(model, placed),)))
    for gguf_name, found in merged.items():
        raise CameraError(
            f"{model.folder} holds {len(found)} of {_expert_count(model)} experts for {gguf_name}: quantize again"
        )
    head = weights[model.family.name("head")]
    if model.family.gguf_rules.own_head and head.name not in model.tensors:
        embedding = weights[model.family.name("embedding")]
        record = model.tensors[embedding.name]
        tensors.append(OutputTensor(head.gguf, record.type, record.shape, (_segment(model, embedding),)))
    return tensors


def _expert_count(model: QuantizedModel) -> int:
    return 0 if model.family.experts is None else model.family.experts.count(model.config)


def _segment(model: QuantizedModel, placed: Placed) -> Segment:
    heads = int(model.config["num_attention_heads"])
    kv_heads = int(model.config.get("num_key_value_heads") or heads)
    permuted = model.family.rotary_heads(placed.weight, heads, kv_heads)
    plus = placed.weight.stored_plus
    read = partial(_rows, model, placed.name, permuted, plus)
    return Segment(read, model.stored(placed.name) if permuted is None and not plus else None)


def _rows(
    model: QuantizedModel, hf_name: str, permuted_heads: int | None, plus: float = 0.0
) -> list[np.ndarray]:
    data = model.packed(hf_name)
    if plus:
        return [shifted(data, model.tensors[hf_name].type, plus)]
    if permuted_heads is None:
        return [data]
    # Of a vector, which is one row, the elements are what is permuted.
    return [interleave(data.reshape(model.tensors[hf_name].shape[0], -1), permuted_heads).reshape(data.shape)]


def _merged(model: QuantizedModel, experts: Sequence[Placed]) -> OutputTensor:
    """The matrices of all experts of a layer end to end: [experts, rows, columns]."""
    records = [model.tensors[placed.name] for placed in experts]
    first = records[0]
    if types := {record.type for record in records} - {first.type}:
        other = next(record for record in records if record.type in types)
        raise CameraError(
            f"{experts[0].gguf} holds all experts of a layer in one type, and {first.name} is {first.type} while "
            f"{other.name} is {other.type}: quantize again with one type for the experts of a layer"
        )
    if any(record.shape != first.shape for record in records):
        raise CameraError(f"{model.folder}: the experts of {experts[0].gguf} differ in shape")
    segments = tuple(_segment(model, placed) for placed in experts)
    return OutputTensor(experts[0].gguf, first.type, (len(experts), *first.shape), segments)


def _parts(model: QuantizedModel, placed: Placed, record: TensorRecord) -> list[OutputTensor]:
    """The tensors that a file holds in place of one matrix."""
    heads = int(model.config["num_attention_heads"])
    rows = [model.family.size(model.config, part.rows) for part in placed.weight.parts]
    if record.shape[0] != heads * sum(rows):
        raise CameraError(
            f"{model.folder}: {record.name} has {record.shape[0]} rows, and config.json asks for {heads * sum(rows)}"
        )
    tensors = []
    for part, start, count in zip(placed.weight.parts, accumulate([0, *rows]), rows, strict=False):
        if part.transposed and BLOCK_FORMATS[record.type].block_length > 1:
            raise CameraError(
                f"{model.folder}: {record.name} is {record.type}, and llama.cpp reads a part of it transposed, which "
                "blocks of a row cannot be: quantize again, with a float type for it"
            )
        shape = (count, record.shape[1])
        read = partial(_part, model, record, heads, start, count, part.transposed)
        tensors.append(
            OutputTensor(
                part.gguf.format(layer=placed.layer),
                record.type,
                (heads, *(shape[::-1] if part.transposed else shape)),
                (Segment(read),),
            )
        )
    return tensors


def _part(
    model: QuantizedModel, record: TensorRecord, heads: int, start: int, count: int, transposed: bool
) -> list[np.ndarray]:
    """Rows `start` to `start + count` of each head: uint8 [heads · rows, bytes per row]."""
    data = model.packed(record.name)
    data = data.reshape(heads, -1, data.shape[-1])[:, start : start + count]
    return [transposed_items(data, record.type) if transposed else data.reshape(heads * count, -1)]


def shifted(data: np.ndarray, type: str, plus: float) -> np.ndarray:
    """Packed vectors of float32 with a number added: uint8 of the same shape."""
    assert type == "f32", "vectors are"
    return (np.ascontiguousarray(data).view(np.float32) + np.float32(plus)).view(np.uint8)


def transposed_items(data: np.ndarray, type: str) -> np.ndarray:
    """Packed matrices [heads, rows, bytes per row] of a float type, each transposed: uint8 [heads · columns, bytes]."""
    items = np.ascontiguousarray(data).view(f"u{BLOCK_FORMATS[type].block_bytes}").swapaxes(1, 2)
    return np.ascontiguousarray(items).reshape(-1, items.shape[-1]).view(np.uint8)
