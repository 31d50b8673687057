"""Which GGUF tensor is which Hugging Face tensor, and in what order its rows are."""

from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache

import gguf
import numpy as np

from camera.errors import CameraError
from camera.models import FAMILIES, Family

EMBEDDING = "model.embed_tokens.weight"
OUTPUT = "lm_head.weight"
_SUFFIXES = (".weight", ".bias")


def family_of_architecture(architecture: str, where: str) -> Family:
    """The family of a GGUF file's `general.architecture`.

    Raises:
        CameraError: for an architecture that no supported family has.
    """
    for family in FAMILIES.values():
        if family.gguf_architecture == architecture:
            return family
    known = ", ".join(family.gguf_architecture for family in FAMILIES.values())
    raise CameraError(f"{where}: architecture {architecture!r} is not supported; supported are {known}")


def gguf_name(family: Family, hf_name: str, layers: int) -> str:
    """The GGUF name of a Hugging Face tensor.

    Raises:
        CameraError: if llama.cpp knows no such tensor in this architecture.
    """
    names = tensor_names(family, layers)
    if hf_name not in names:
        raise CameraError(f"{hf_name} has no place in a GGUF file of architecture {family.gguf_architecture}")
    return names[hf_name]


@cache
def tensor_names(family: Family, layers: int) -> dict[str, str]:
    """The GGUF name of every tensor that a checkpoint of a family may hold, by its Hugging Face name, in order."""
    names = _name_map(family.gguf_architecture, layers)
    pairs = ((name, names.get_name(name, try_suffixes=_SUFFIXES)) for name in _candidates(layers))
    return {hf_name: name for hf_name, name in pairs if name is not None}


def _candidates(layers: int) -> Iterator[str]:
    yield EMBEDDING
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        yield f"{prefix}input_layernorm.weight"
        for part in "qkvo":
            yield f"{prefix}self_attn.{part}_proj.weight"
            yield f"{prefix}self_attn.{part}_proj.bias"
        for part in "qk":
            yield f"{prefix}self_attn.{part}_norm.weight"
        yield f"{prefix}post_attention_layernorm.weight"
        for part in ("gate", "up", "down"):
            yield f"{prefix}mlp.{part}_proj.weight"
            yield f"{prefix}mlp.{part}_proj.bias"
    yield "model.norm.weight"
    yield OUTPUT


def rotary_heads(family: Family, hf_name: str, heads: int, kv_heads: int) -> int | None:
    """How many heads a tensor's rows are permuted in for llama.cpp; None if they are not."""
    if not family.permutes_rotary:
        return None
    if fnmatch(hf_name, "*.self_attn.q_proj.*"):
        return heads
    if fnmatch(hf_name, "*.self_attn.k_proj.*"):
        return kv_heads
    return None


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Each head's rows from (first half, second half) to pairs, as llama.cpp rotates them. [rows, ...]"""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def split_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `interleave`."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


@cache
def _name_map(architecture: str, layers: int) -> gguf.TensorNameMap:
    for number, name in gguf.MODEL_ARCH_NAMES.items():
        if name == architecture:
            return gguf.get_tensor_name_map(number, layers)
    raise CameraError(f"the installed gguf library does not know {architecture}: update it")
