"""GGUF files, stock ones and ours, read lazily and without trust in what they claim.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The gguf library's reader is not used: it
refuses a type number that it does not know, reads Q4_0_64 as the NVFP4 that shares its number, and takes every
count in the file at its word.
"""

from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from camera.errors import CameraError
from camera.formats.gguf_file import GgufFile, GgufTensor, numbers
from camera.formats.gguf_parser import Parser, TensorEntry, map_file
from camera.formats.rope import (
    DEFAULT_THETA,
    PARAMETERS_KEY,
    ROPE_FACTORS,
    SCALED,
    split_halves,
    stated_parameters,
)
from camera.models import Family, Weight, named_weights
from camera.registry import BLOCK_FORMATS

__all__ = [
    "GgufFile",
    "GgufTensor",
    "hf_config",
    "hf_names",
    "is_q4_0_64",
    "open_gguf",
    "packed_hf_tensor",
    "read_hf_tensor",
]


def open_gguf(path: Path | str) -> GgufFile:
    """Read a file's metadata and tensor list; no weights.

    Raises:
        CameraError: if the file is missing, damaged, truncated, of another version or byte order, or holds
            type 40 without saying that this is Q4_0_64.
    """
    path = Path(path)
    raw = map_file(path)
    parser = Parser(path, raw)
    metadata, entries, data_start = parser.parse()
    content = np.frombuffer(raw, np.uint8)
    tensors = {entry.name: _tensor(path, entry, content[data_start:], metadata) for entry in entries.values()}
    return GgufFile(path, metadata, parser.value_types, tensors)


def is_q4_0_64(file: GgufFile) -> bool:
    """Whether a file holds Q4_0_64, which a stock llama.cpp would read as NVFP4 and print garbage from."""
    return any(tensor.type == "q4_0_64" for tensor in file.tensors.values())


def hf_config(file: GgufFile) -> dict[str, Any]:
    """The config.json that makes transformers build the model of a file.

    Raises:
        CameraError: if the architecture is not supported, or a key that it needs is missing.
    """
    family = file.family
    prefix = f"{file.architecture}."
    hidden = file.value(f"{prefix}embedding_length", int)
    heads, kv_heads = _heads(file)
    weights = named_weights(family, {"num_hidden_layers": 1})
    embedding = file.tensor(weights[family.name("embedding")].gguf)
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "hidden_size": hidden,
        family.width_keys({})[0]: _one_width(file, f"{prefix}feed_forward_length"),
        "num_hidden_layers": _layer_count(file),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": file.value(f"{prefix}attention.key_length", int, hidden // heads),
        "max_position_embeddings": file.value(f"{prefix}context_length", int),
        "rms_norm_eps": file.value(f"{prefix}attention.layer_norm_rms_epsilon", float),
        "vocab_size": embedding.shape[0] if embedding.shape else 1,
        "hidden_act": "silu",
        "dtype": "float32",
        **_rope(file, prefix),
    }
    for placed in weights.values():
        if (when := placed.weight.when) is not None:  # whether it is there tells what the config says
            config[when.key] = (placed.gguf in file.tensors) == when.expected
    for key, stored in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if f"tokenizer.ggml.{stored}_token_id" in file.metadata:
            config[f"{key}_token_id"] = file.value(f"tokenizer.ggml.{stored}_token_id", int)
    return config


def hf_names(file: GgufFile) -> dict[str, str]:
    """The Hugging Face name of every tensor of a model, with its GGUF name.

    Raises:
        CameraError: if the architecture is not supported, or a tensor has no place in it.
    """
    family = file.family
    possible = named_weights(family, {"num_hidden_layers": _layer_count(file)})
    names = {name: placed.gguf for name, placed in possible.items() if placed.gguf in file.tensors}
    strange = file.tensors.keys() - set(names.values()) - {ROPE_FACTORS}
    if strange:
        raise CameraError(f"{file.path}: {min(strange)} has no place in a {family.architecture}")
    return names


def packed_hf_tensor(file: GgufFile, hf_name: str) -> tuple[str, np.ndarray]:
    """A tensor's type and bytes, with the rows in the order of the Hugging Face checkpoint.

    Returns:
        its type, and uint8 [rows, bytes per row]; a vector is one row.

    Raises:
        CameraError: if there is no such tensor.
    """
    family, weight, tensor = _tensor_of(file, hf_name)
    permuted = family.rotary_heads(weight, *_heads(file))
    if permuted is None or not tensor.shape:
        return tensor.type, tensor.data
    rows = tensor.data.reshape(tensor.shape[0], -1)  # of a vector the elements are what is permuted
    if len(rows) % (2 * permuted):
        raise CameraError(
            f"{file.path}: {tensor.name} has {len(rows)} rows, which {permuted} heads cannot share"
        )
    return tensor.type, split_halves(rows, permuted).reshape(tensor.data.shape)


def read_hf_tensor(file: GgufFile, hf_name: str) -> torch.Tensor:
    """A tensor's numbers as the Hugging Face checkpoint has them: float32, in its shape.

    Raises:
        CameraError: if there is no such tensor, or its type cannot be read here.
    """
    _, _, tensor = _tensor_of(file, hf_name)
    _, data = packed_hf_tensor(file, hf_name)
    return torch.from_numpy(numbers(file.path, tensor, data)).reshape(tensor.shape)


def _tensor_of(file: GgufFile, hf_name: str) -> tuple[Family, Weight, GgufTensor]:
    """The tensor of a Hugging Face name."""
    family = file.family
    weights = named_weights(family, {"num_hidden_layers": _layer_count(file)})
    if hf_name not in weights:
        raise CameraError(f"{hf_name} has no place in a GGUF file of architecture {family.gguf_architecture}")
    placed = weights[hf_name]
    return family, placed.weight, file.tensor(placed.gguf)


def _layer_count(file: GgufFile) -> int:
    layers = file.value(f"{file.architecture}.block_count", int)
    if not 0 < layers <= len(file.tensors):
        raise CameraError(
            f"{file.path}: {file.architecture}.block_count is {layers}, and there are {len(file.tensors)} tensors: "
            "the file is damaged, fetch or write it again"
        )
    return layers


def _heads(file: GgufFile) -> tuple[int, int]:
    heads = file.value(f"{file.architecture}.attention.head_count", int)
    kv_heads = file.value(f"{file.architecture}.attention.head_count_kv", int, heads)
    if not heads or not kv_heads:
        raise CameraError(f"{file.path}: no attention heads: the file is damaged, fetch or write it again")
    return heads, kv_heads


def _one_width(file: GgufFile, key: str) -> int:
    widths = file.metadata.get(key)
    if not isinstance(widths, list) or not widths:
        return file.value(key, int)
    if any(width != widths[0] for width in widths) or not isinstance(widths[0], int):
        raise CameraError(
            f"{file.path}: {key} differs from layer to layer ({str(widths)[:60]}): only one width is read"
        )
    return widths[0]


def _rope(file: GgufFile, prefix: str) -> dict[str, Any]:
    """The rotary keys as config.json writes them."""
    theta = file.value(f"{prefix}rope.freq_base", float, DEFAULT_THETA)
    if ROPE_FACTORS in file.tensors:
        return stated_parameters(file.value(PARAMETERS_KEY, str), str(file.path))
    kind = file.value(f"{prefix}rope.scaling.type", str, "none")
    if kind == "none":
        return {"rope_theta": theta}
    if kind not in SCALED:
        raise CameraError(
            f"{file.path}: rope scaling {kind!r} is not supported; supported are {', '.join(SCALED)}"
        )
    scaling = {"rope_type": kind, "factor": file.value(f"{prefix}rope.scaling.factor", float)}
    if (key := f"{prefix}rope.scaling.original_context_length") in file.metadata:
        scaling["original_max_position_embeddings"] = file.value(key, int)
    return {"rope_theta": theta, "rope_scaling": scaling}


def _tensor(path: Path, entry: TensorEntry, content: np.ndarray, metadata: dict[str, Any]) -> GgufTensor:
    type_name, block_length, block_bytes = _type(path, entry, metadata)
    row_length = entry.shape[-1] if entry.shape else 1
    if row_length % block_length:
        raise CameraError(
            f"{path}: {entry.name} has rows of {row_length} and {type_name} has blocks of {block_length}: "
            "the file is damaged, fetch or write it again"
        )
    row_bytes = row_length // block_length * block_bytes
    rows = prod(entry.shape[:-1])
    end = entry.offset + rows * row_bytes
    if end > len(content):
        raise CameraError(
            f"{path} ends before {entry.name} does ({len(content)} of {end} bytes of tensors): it is "
            "truncated, fetch or write it again"
        )
    return GgufTensor(
        entry.name, type_name, entry.shape, content[entry.offset : end].reshape(rows, row_bytes)
    )


def _type(path: Path, entry: TensorEntry, metadata: dict[str, Any]) -> tuple[str, int, int]:
    """Name, block length and block bytes of a tensor's type."""
    number = entry.type_number
    form = next((form for form in BLOCK_FORMATS.values() if form.tensor_number == number), None)
    if form is not None:
        if (marker := form.marker) is not None and metadata.get(marker.key) != marker.value:
            name = form.name.upper()
            raise CameraError(
                f"{path}: {entry.name} is of type {number}. In stock files that is {marker.stock}, which is not read "
                f"here; a {name} file says so in the key {marker.key}, and this one does not. If it came from another "
                f"tool's {name}, convert the checkpoint again with this one"
            )
        return form.name, form.block_length, form.block_bytes
    try:
        stock = gguf.GGMLQuantizationType(number)
        block_length, block_bytes = gguf.GGML_QUANT_SIZES[stock]
    except (ValueError, KeyError):
        raise CameraError(
            f"{path}: {entry.name} is of type {number}, which is not known here: the file is damaged, or "
            "of a newer llama.cpp"
        ) from None
    return stock.name.lower(), block_length, block_bytes
