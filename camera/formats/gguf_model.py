"""The model of a GGUF file, as a Hugging Face checkpoint would have it: config, names, tensors."""

import re
from typing import Any, NamedTuple

import numpy as np
import torch

from camera.errors import CameraError, understood
from camera.formats import blocks
from camera.formats.gguf_file import GgufFile, GgufTensor
from camera.formats.gguf_rope import read_rope
from camera.formats.gguf_tensors import transposed_items
from camera.formats.rope import LONG_FACTORS, ROPE_FACTORS, split_halves
from camera.models import Family, Placed, named_weights
from camera.models.gguf import FULL, SLIDING, WINDOW, WINDOW_LAYERS, N, Window, config_of
from camera.models.limits import MOST_LAYERS_FOR_EACH, check_config


def hf_config(file: GgufFile) -> dict[str, Any]:
    """The config.json that makes transformers build the model of a file.

    Raises:
        CameraError: if the architecture is not supported, or a key that it needs is missing.
    """
    return dict(_model(file).config)


def hf_names(file: GgufFile) -> dict[str, str]:
    """The Hugging Face name of every tensor of a model, with its GGUF name: that of the first part where it has several.

    Raises:
        CameraError: if the architecture is not supported, or a tensor has no place in it.
    """
    model = _model(file)
    names = {
        name: _gguf_names(placed)[0]
        for name, placed in model.weights.items()
        if all(part in file.tensors for part in _gguf_names(placed))
    }
    used = {part for name in names for part in _gguf_names(model.weights[name])}
    predicting = {name for name in file.tensors if _is_behind(name, int(model.config["num_hidden_layers"]))}
    if strange := file.tensors.keys() - used - predicting - {ROPE_FACTORS, *LONG_FACTORS.values()}:
        raise CameraError(f"{file.path}: {min(strange)} has no place in a {model.family.architecture}")
    return names


def cached_numbers(file: GgufFile) -> int:
    """How many numbers llama.cpp keeps of one position in all layers: keys and values, or one latent vector for both."""
    model = _model(file)
    heads, kv_heads = _heads(file)
    prefix = f"{file.architecture}.attention."
    width = file.value(f"{prefix}key_length", int, int(model.config["hidden_size"]) // heads)
    if not model.family.gguf_rules.latent:
        width += file.value(f"{prefix}value_length", int, width)
    return width * kv_heads * int(model.config["num_hidden_layers"])


def packed_hf_tensor(file: GgufFile, hf_name: str) -> tuple[str, np.ndarray]:
    """A tensor's type and bytes, with the rows in the order of the Hugging Face checkpoint.

    Returns:
        its type, and uint8 [rows, bytes per row]; a vector is one row. What parts in blocks make is float32.

    Raises:
        CameraError: if there is no such tensor.
    """
    placed = _placed(file, hf_name)
    if placed.weight.parts:
        return _joined(file, placed)
    tensor = _own(file, placed)
    if plus := placed.weight.stored_plus:
        numbers = tensor.numbers(tensor.data) - np.float32(plus)
        return "f32", numbers.reshape(1, -1).view(np.uint8)
    permuted = _model(file).family.rotary_heads(placed.weight, *_heads(file))
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
    placed = _placed(file, hf_name)
    type, data = packed_hf_tensor(file, hf_name)
    if placed.weight.parts:
        return torch.from_numpy(blocks.dequantize(data, type, _part_shapes(file, placed)[0][2]))
    tensor = _own(file, placed)
    shape = (1, *tensor.shape) if placed.weight.shape[0] == "1" else tensor.shape
    if placed.weight.stored_plus:
        return torch.from_numpy(blocks.dequantize(data, type, data.shape[1] // 4)).reshape(shape)
    return torch.from_numpy(tensor.numbers(data)).reshape(shape)


def hf_shape(file: GgufFile, hf_name: str) -> tuple[int, ...]:
    """The shape of a tensor in the Hugging Face checkpoint, as the file's tensors have it; reads none.

    Raises:
        CameraError: if there is no such tensor.
    """
    placed = _placed(file, hf_name)
    if placed.weight.parts:
        shapes = _part_shapes(file, placed)
        return sum(heads * rows for heads, rows, _ in shapes), shapes[0][2]
    shape = _own(file, placed).shape
    return (1, *shape) if placed.weight.shape[0] == "1" else shape


_LAYER = re.compile(r"blk\.(\d+)\.")


class _Model(NamedTuple):
    """What a file's keys and tensor list say of the model."""

    family: Family
    config: dict[str, Any]
    weights: dict[str, Placed]
    """All that it may hold, by Hugging Face name."""


def _model(file: GgufFile) -> _Model:
    if "model" not in file.memo:
        with understood(str(file.path), "fetch or write it again"):
            config = _config(file, file.family)
        file.memo["model"] = _Model(file.family, config, named_weights(file.family, config))
    model: _Model = file.memo["model"]
    return model


def _config(file: GgufFile, family: Family) -> dict[str, Any]:
    prefix = f"{file.architecture}."
    hidden = file.value(f"{prefix}embedding_length", int)
    heads, kv_heads = _heads(file)
    embedding = file.tensor(next(weight.gguf for weight in family.weights if weight.role == "embedding"))
    head_dim = file.value(f"{prefix}attention.key_length", int, hidden // heads)
    turned = file.value(f"{prefix}rope.dimension_count", int, head_dim)
    layers = _layer_count(file)
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "hidden_size": hidden,
        family.feed_forward_key: _one_width(file, f"{prefix}feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": file.value(f"{prefix}context_length", int),
        "rms_norm_eps": file.value(f"{prefix}attention.layer_norm_rms_epsilon", float),
        "vocab_size": embedding.shape[0] if embedding.shape else 1,
        "dtype": "float32",
        **read_rope(file, turned),
    }
    if not family.gguf_rules.latent and (family.gguf_rules.rotary_share != 1 or turned != head_dim):
        config["partial_rotary_factor"] = turned / max(1, head_dim)
    for weight in family.weights:
        if weight.when is not None:  # whether it is there tells what the config says
            names = (weight.gguf.format(layer=layer) for layer in range(layers))
            config[weight.when.key] = any(name in file.tensors for name in names) == weight.when.expected
    for key, stored in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if f"tokenizer.ggml.{stored}_token_id" in file.metadata:
            config[f"{key}_token_id"] = file.value(f"tokenizer.ggml.{stored}_token_id", int)
    if family.experts is not None:
        _check_experts(file, family)

    def stated(name: str, kind: type[N], default: N | None = None) -> N:
        return file.value(f"{prefix}{name}", kind, default)

    rules = family.gguf_rules
    config |= config_of(rules, family.experts, stated)
    if rules.further is not None:
        config |= rules.further.config(stated, config)
    if rules.window is not None:
        config |= _windows(file, rules.window, layers)
    if family.experts is not None and (problem := family.experts.problem(config)) is not None:
        raise CameraError(f"{file.path}: no {file.architecture} can be of these numbers: {problem}")
    return check_config(config, str(file.path))


def _windows(file: GgufFile, window: Window, layers: int) -> dict[str, Any]:
    """Which layers see a window, and how long it is."""
    length = file.value(f"{file.architecture}.{WINDOW}", int, window.assumed(layers))
    given = file.metadata.get(f"{file.architecture}.{WINDOW_LAYERS}")
    seen = given if isinstance(given, list) and len(given) == layers else window.layers(layers)
    kinds = [SLIDING if length and slides else FULL for slides in seen]
    return {"sliding_window": length or None, "layer_types": kinds}


def _check_experts(file: GgufFile, family: Family) -> None:
    """Refuse a number of experts that the merged tensors do not have, before anything is counted up to it."""
    count = file.value(f"{file.architecture}.expert_count", int)
    layers = range(_layer_count(file))
    names = {
        weight.gguf.format(layer=layer)
        for weight in family.weights
        if weight.block == "expert"
        for layer in layers
    }
    found = [tensor for name, tensor in file.tensors.items() if name in names]
    wrong = next((tensor for tensor in found if len(tensor.shape) != 3 or tensor.shape[0] != count), None)
    if wrong is not None or not found:
        what = f"{wrong.name} has shape {list(wrong.shape)}" if wrong is not None else "no tensor holds any"
        raise CameraError(f"{file.path}: {file.architecture}.expert_count is {count}, and {what}")
    if len(layers) > MOST_LAYERS_FOR_EACH * len(found):
        raise CameraError(f"{file.path}: {len(layers)} layers, and {len(found)} tensors that hold experts")


def _placed(file: GgufFile, hf_name: str) -> Placed:
    model = _model(file)
    if hf_name not in model.weights:
        raise CameraError(f"{hf_name} has no place in a GGUF file of architecture {file.architecture}")
    return model.weights[hf_name]


def _gguf_names(placed: Placed) -> tuple[str, ...]:
    """The tensors that hold a weight."""
    return tuple(name.format(layer=placed.layer) for name in placed.weight.stored)


def _own(file: GgufFile, placed: Placed) -> GgufTensor:
    """The tensor of a weight; of an expert its rows of the tensor that holds all."""
    tensor = file.tensor(placed.gguf)
    return tensor if placed.expert is None else tensor.item(placed.expert)


def _part_shapes(file: GgufFile, placed: Placed) -> list[tuple[int, int, int]]:
    """[heads, rows, row length] of each part, as the Hugging Face checkpoint has them."""
    shapes = []
    for part, name in zip(placed.weight.parts, _gguf_names(placed), strict=True):
        tensor = file.tensor(name)
        if len(tensor.shape) != 3 or tensor.shape[0] != _heads(file)[0]:
            raise CameraError(
                f"{file.path}: {name} has shape {list(tensor.shape)}, not one matrix for each head"
            )
        heads, rows, length = tensor.shape
        shapes.append((heads, length, rows) if part.transposed else (heads, rows, length))
    if len({(heads, length) for heads, _, length in shapes}) != 1:
        raise CameraError(f"{file.path}: the parts of {placed.name} do not fit together: {shapes}")
    return shapes


def _joined(file: GgufFile, placed: Placed) -> tuple[str, np.ndarray]:
    """A matrix from its parts: in their type if that is a float, else as float32."""
    tensors = [file.tensor(name) for name in _gguf_names(placed)]
    types = {tensor.type for tensor in tensors}
    type = tensors[0].type if len(types) == 1 and tensors[0].type in ("f32", "f16", "bf16") else "f32"
    parts = []
    for part, tensor, shape in zip(placed.weight.parts, tensors, _part_shapes(file, placed), strict=True):
        data = tensor.data if tensor.type == type else tensor.numbers(tensor.data).view(np.uint8)
        data = data.reshape(*tensor.shape[:2], -1)
        rows = transposed_items(data, type) if part.transposed else data
        parts.append(rows.reshape(shape[0], shape[1], -1))
    joined = np.concatenate(parts, axis=1)
    return type, joined.reshape(-1, joined.shape[-1])


def _is_behind(name: str, layers: int) -> bool:
    """Whether a tensor is of a layer behind the last, which predicts further tokens and is left aside."""
    found = _LAYER.match(name)
    return found is not None and int(found[1]) >= layers


def _layer_count(file: GgufFile) -> int:
    """Decoder layers; files of other tools also count those that predict further tokens."""
    layers = file.value(f"{file.architecture}.block_count", int)
    layers -= file.value(f"{file.architecture}.nextn_predict_layers", int, 0)
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
