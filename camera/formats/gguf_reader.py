"""GGUF files, stock ones and ours, read lazily and without trust in what they claim.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The gguf library's reader is not used: it
refuses a type number that it does not know, reads Q4_0_64 as the NVFP4 that shares its number, and takes every
count in the file at its word.
"""

import mmap
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from camera.errors import CameraError
from camera.formats import blocks
from camera.formats.gguf_parser import Parser, TensorEntry
from camera.formats.layout import LAYOUT_KEY, Q4_0_64_LAYOUT
from camera.formats.names import (
    EMBEDDING,
    OUTPUT,
    family_of_architecture,
    gguf_name,
    rotary_heads,
    split_halves,
    tensor_names,
)
from camera.formats.rope import ROPE_FACTORS, read_rope

_OURS = {form.tensor_number: (name, form) for name, form in blocks.FORMATS.items() if name != "q4_0_64"}
_Q4_0_64 = blocks.FORMATS["q4_0_64"]


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file; its bytes are read when they are touched."""

    name: str
    type: str
    """A BlockType, or the lower-case name of another ggml type (`q6_k`) in files of other makers."""
    shape: tuple[int, ...]
    """In torch's order: rows first, the length of a row last."""
    data: np.ndarray = field(repr=False, compare=False)
    """uint8 [rows, bytes per row], a read-only map of the file; a vector is one row."""


@dataclass(frozen=True)
class GgufFile:
    """An open GGUF file."""

    path: Path
    metadata: dict[str, Any]
    """Every key, in file order: int, float, bool, str, or a list of them."""
    value_types: dict[str, tuple[int, int | None]]
    """The GGUF type number of each key's value, and of its items where it is an array."""
    tensors: dict[str, GgufTensor]
    """Every tensor by its GGUF name, in file order."""

    @cached_property
    def architecture(self) -> str:
        """`general.architecture`."""
        return str(self.require("general.architecture"))

    def require(self, key: str) -> Any:
        """A key that must be there.

        Raises:
            CameraError: if it is not.
        """
        if key not in self.metadata:
            raise CameraError(f"{self.path} has no key {key}: it is no language model, or a damaged one")
        return self.metadata[key]

    def tensor(self, name: str) -> GgufTensor:
        """A tensor by its GGUF name.

        Raises:
            CameraError: if there is none.
        """
        if name not in self.tensors:
            raise CameraError(f"{self.path} has no tensor {name}")
        return self.tensors[name]

    def dequantize(self, name: str) -> torch.Tensor:
        """The numbers of a tensor: float32, of its shape.

        Raises:
            CameraError: if there is no such tensor, or its type cannot be read here.
        """
        tensor = self.tensor(name)
        return torch.from_numpy(_numbers(self.path, tensor, tensor.data)).reshape(tensor.shape)


def open_gguf(path: Path | str) -> GgufFile:
    """Read a file's metadata and tensor list; no weights.

    Raises:
        CameraError: if the file is missing, damaged, truncated, of another version or byte order, or holds
            type 40 without saying that this is Q4_0_64.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                raise CameraError(f"{path} is empty: fetch or write it again")
            raw = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise CameraError(f"{path} is missing: give the path of a .gguf file") from None
    except OSError as error:
        raise CameraError(f"{path} cannot be read: {error}") from None
    parser = Parser(path, raw)
    metadata, entries, data_start = parser.parse()
    content = np.frombuffer(raw, np.uint8)
    is_ours = metadata.get(LAYOUT_KEY) == Q4_0_64_LAYOUT
    tensors = {
        entry.name: _tensor(path, entry, content[data_start:], is_ours=is_ours) for entry in entries.values()
    }
    return GgufFile(path, metadata, parser.value_types, tensors)


def is_q4_0_64(file: GgufFile) -> bool:
    """Whether a file holds Q4_0_64, which a stock llama.cpp would read as NVFP4 and print garbage from."""
    return any(tensor.type == "q4_0_64" for tensor in file.tensors.values())


def hf_config(file: GgufFile) -> dict[str, Any]:
    """The config.json that makes transformers build the model of a file.

    Raises:
        CameraError: if the architecture is not supported, or a key that it needs is missing.
    """
    family = family_of_architecture(file.architecture, str(file.path))
    prefix = f"{file.architecture}."
    hidden = int(file.require(f"{prefix}embedding_length"))
    heads = int(file.require(f"{prefix}attention.head_count"))
    embedding = file.tensor(gguf_name(family, EMBEDDING, 1))
    has_bias = "blk.0.attn_output.bias" in file.tensors
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "hidden_size": hidden,
        "intermediate_size": _one_width(file, f"{prefix}feed_forward_length"),
        "num_hidden_layers": _layer_count(file),
        "num_attention_heads": heads,
        "num_key_value_heads": int(file.metadata.get(f"{prefix}attention.head_count_kv", heads)),
        "head_dim": int(file.metadata.get(f"{prefix}attention.key_length", hidden // max(heads, 1))),
        "max_position_embeddings": int(file.require(f"{prefix}context_length")),
        "rms_norm_eps": _shortest(file.require(f"{prefix}attention.layer_norm_rms_epsilon")),
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": gguf_name(family, OUTPUT, 1) not in file.tensors,
        "hidden_act": "silu",
        # One fact under the names that the families give it.
        "attention_bias": has_bias,
        "bias": has_bias,
        "mlp_bias": "blk.0.ffn_down.bias" in file.tensors,
        "dtype": "float32",
        **read_rope(file.metadata, prefix, file.tensors, str(file.path)),
    }
    for key, stored in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if (number := file.metadata.get(f"tokenizer.ggml.{stored}_token_id")) is not None:
            config[f"{key}_token_id"] = number
    return config


def hf_names(file: GgufFile) -> dict[str, str]:
    """The Hugging Face name of every tensor of a model, with its GGUF name.

    Raises:
        CameraError: if the architecture is not supported, or a tensor has no place in it.
    """
    family = family_of_architecture(file.architecture, str(file.path))
    possible = tensor_names(family, _layer_count(file))
    names = {hf_name: name for hf_name, name in possible.items() if name in file.tensors}
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
    family = family_of_architecture(file.architecture, str(file.path))
    layers = _layer_count(file)
    tensor = file.tensor(gguf_name(family, hf_name, layers))
    prefix = f"{file.architecture}."
    heads = int(file.require(f"{prefix}attention.head_count"))
    kv_heads = int(file.metadata.get(f"{prefix}attention.head_count_kv", heads))
    permuted = rotary_heads(family, hf_name, heads, kv_heads)
    if permuted is None:
        return tensor.type, tensor.data
    rows = tensor.data.reshape(tensor.shape[0], -1)  # of a vector the elements are what is permuted
    if permuted <= 0 or len(rows) % (2 * permuted):
        raise CameraError(
            f"{file.path}: {tensor.name} has {len(rows)} rows, which {permuted} heads cannot share"
        )
    return tensor.type, split_halves(rows, permuted).reshape(tensor.data.shape)


def read_hf_tensor(file: GgufFile, hf_name: str) -> torch.Tensor:
    """A tensor's numbers as the Hugging Face checkpoint has them: float32, in its shape.

    Raises:
        CameraError: if there is no such tensor, or its type cannot be read here.
    """
    family = family_of_architecture(file.architecture, str(file.path))
    tensor = file.tensor(gguf_name(family, hf_name, _layer_count(file)))
    _, data = packed_hf_tensor(file, hf_name)
    return torch.from_numpy(_numbers(file.path, tensor, data)).reshape(tensor.shape)


def _layer_count(file: GgufFile) -> int:
    layers = file.require(f"{file.architecture}.block_count")
    if not isinstance(layers, int) or not 0 < layers <= len(file.tensors):
        raise CameraError(
            f"{file.path}: {file.architecture}.block_count is {layers!r}, and there are {len(file.tensors)} tensors: "
            "the file is damaged, fetch or write it again"
        )
    return layers


def _one_width(file: GgufFile, key: str) -> int:
    widths = file.require(key)
    distinct = set(widths) if isinstance(widths, list) else {widths}
    if len(distinct) != 1:
        raise CameraError(
            f"{file.path}: {key} differs from layer to layer ({widths}): only one width is read"
        )
    return int(distinct.pop())


def _shortest(number: float) -> float:
    """The shortest decimal number that a float32 stands for: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(number)))


def _tensor(path: Path, entry: TensorEntry, content: np.ndarray, *, is_ours: bool) -> GgufTensor:
    type_name, block_length, block_bytes = _type(path, entry, is_ours=is_ours)
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


def _type(path: Path, entry: TensorEntry, *, is_ours: bool) -> tuple[str, int, int]:
    """Name, block length and block bytes of a tensor's type."""
    number = entry.type_number
    if number == _Q4_0_64.tensor_number:
        if is_ours:
            return "q4_0_64", _Q4_0_64.block_length, _Q4_0_64.block_bytes
        raise CameraError(
            f"{path}: {entry.name} is of type 40. In stock files that is NVFP4, which is not read here; a "
            f"Q4_0_64 file says so in the key {LAYOUT_KEY}, and this one does not. If it came from another "
            "tool's Q4_0_64, convert the checkpoint again with this one"
        )
    if number in _OURS:
        name, form = _OURS[number]
        return name, form.block_length, form.block_bytes
    try:
        stock = gguf.GGMLQuantizationType(number)
        block_length, block_bytes = gguf.GGML_QUANT_SIZES[stock]
    except (ValueError, KeyError):
        raise CameraError(
            f"{path}: {entry.name} is of type {number}, which is not known here: the file is damaged, or "
            "of a newer llama.cpp"
        ) from None
    return stock.name.lower(), block_length, block_bytes


def _numbers(path: Path, tensor: GgufTensor, data: np.ndarray) -> np.ndarray:
    row_length = tensor.shape[-1] if tensor.shape else 1
    for ours in blocks.FORMATS:
        if tensor.type == ours:
            return blocks.dequantize(data, ours, row_length)
    try:
        return gguf.dequantize(data, gguf.GGMLQuantizationType[tensor.type.upper()])
    except (NotImplementedError, KeyError):
        raise CameraError(
            f"{path}: {tensor.name} is {tensor.type}, which cannot be turned into numbers here: "
            "requantise the file as q4_0, q8_0 or f16"
        ) from None
