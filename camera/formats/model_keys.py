"""The keys by which llama.cpp builds a model, from its config.json."""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, Protocol

import gguf
import numpy as np

from camera.errors import CameraError
from camera.formats.gguf_writer import OutputTensor, Segment
from camera.formats.quantized_model import QuantizedModel
from camera.formats.rope import write_rope
from camera.models import Family
from camera.models.gguf import LEAD, SLIDING, STEP, Number, numbers, window_of

_KINDS = {
    bool: gguf.GGUFValueType.BOOL,
    int: gguf.GGUFValueType.UINT32,
    float: gguf.GGUFValueType.FLOAT32,
}


class Shaped(Protocol):
    """A tensor of a checkpoint or of a folder of packed tensors."""

    @property
    def shape(self) -> tuple[int, ...]: ...


class Described(Protocol):
    """A checkpoint, or a folder of packed tensors: all that a file's keys are made of."""

    @property
    def folder(self) -> Path: ...
    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def family(self) -> Family: ...
    @property
    def tensors(self) -> Mapping[str, Shaped]: ...


def size_label(model: QuantizedModel) -> str:
    """How many weights a model has, for people; of a mixture of experts as the number of experts times one expert."""
    parameters = sum(record.parameters for record in model.report.tensors)
    if model.family.experts is None:
        return gguf.size_label(parameters, parameters, 0, 0)
    count = model.family.experts.count(model.config)
    matrices = {
        name
        for layer in range(int(model.config["num_hidden_layers"]))
        for block in model.family.blocks(model.config, layer)
        if block.expert is not None
        for name in block.names
    }
    routed = sum(record.parameters for name, record in model.tensors.items() if name in matrices)
    return gguf.size_label(parameters, parameters - routed, routed // count, count)


def write_model_keys(writer: gguf.GGUFWriter, model: Described) -> tuple[list[str], list[OutputTensor]]:
    """Add the architecture's keys.

    Returns:
        what the user should know, a sentence each; and tensors that are computed from the config, to stand first.

    Raises:
        CameraError: if config.json lacks a key, or says what GGUF cannot.
    """
    config, family = model.config, model.family
    rules = family.gguf_rules
    heads = int(config["num_attention_heads"])
    kv_heads = 1 if rules.latent else int(config.get("num_key_value_heads") or heads)
    try:
        writer.add_block_count(int(config["num_hidden_layers"]))
        writer.add_context_length(int(config["max_position_embeddings"]))
        writer.add_embedding_length(int(config["hidden_size"]))
        writer.add_feed_forward_length(int(config[family.feed_forward_key]))
        writer.add_head_count(heads)
        writer.add_head_count_kv(kv_heads)
        if rules.latent:  # what is turned is a part of its own, and lengths are among the numbers below
            rotary = family.size(config, "qk_rope_head_dim")
        else:
            head_dim = _head_dim(model)
            writer.add_key_length(head_dim)
            writer.add_value_length(head_dim)
            rotary = int(head_dim * rotary_share(config, rules.rotary_share))
        writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
        writer.add_vocab_size(model.tensors[family.name("embedding")].shape[0])
        further = numbers(rules, family.experts, config)
    except KeyError as error:
        raise CameraError(f"{model.folder / 'config.json'} has no {error.args[0]}") from None
    _check_layers(model, further)
    for name, value in further.items():
        writer.add_key_value(f"{family.gguf_architecture}.{name}", value, _KINDS[type(value)])
    computed = [
        _computed(name, factors)
        for name, factors in write_rope(writer, dict(rules.rope(config)), rotary).items()
    ]
    return [*_write_window(writer, config, family), *rules.warnings(config)], computed


def _head_dim(model: Described) -> int:
    """From the queries' weights where they are a matrix of their own: config.json may leave a family's default unsaid."""
    if not any(weight.role == "query" for weight in model.family.weights):
        return model.family.size(model.config, "head_dim")
    rows = model.tensors[model.family.name("query")].shape[0]
    return rows // int(model.config["num_attention_heads"])


def rotary_share(config: dict[str, Any], default: float) -> float:
    """How much of a head is turned by its position."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return float(config.get("partial_rotary_factor") or parameters.get("partial_rotary_factor") or default)


def _computed(name: str, factors: np.ndarray) -> OutputTensor:
    bytes_ = factors.view(np.uint8).reshape(1, -1)
    assert bytes_.size == 4 * prod(factors.shape)
    return OutputTensor(name, "f32", factors.shape, (Segment(lambda: [bytes_]),))


def _check_layers(model: Described, stated: dict[str, Number]) -> None:
    """Refuse a model whose dense layers lie elsewhere than llama.cpp will look for them."""
    if model.family.experts is None:
        return
    lead, step = int(stated.get(LEAD, 0)), int(stated.get(STEP, 1))
    for layer in range(int(model.config["num_hidden_layers"])):
        if model.family.is_sparse(model.config, layer) != (layer >= lead and (layer + 1) % step == 0):
            raise CameraError(
                f"{model.folder}: layer {layer} has {'no ' * (layer >= lead)}experts, and there is no key by which "
                f"llama.cpp would know that of a {model.family.gguf_architecture}: such a model has no GGUF file"
            )


def _write_window(writer: gguf.GGUFWriter, config: dict[str, Any], family: Family) -> list[str]:
    """Add the keys of sliding windows; what to know where llama.cpp has none in this family, a sentence."""
    window = family.gguf_rules.window
    if window is None:
        if not (length := window_of(config)):
            return []
        return [
            f"config.json uses a sliding window of {length} tokens, and llama.cpp attends to the whole context in this family: "
            "beyond so many tokens its logits will differ"
        ]
    slides = [kind == SLIDING for kind in config["layer_types"]]
    if any(slides):
        writer.add_sliding_window(int(config["sliding_window"]))
    if slides != window.layers(len(slides)) and (any(slides) or window.assumed(len(slides))):
        writer.add_sliding_window_pattern(slides)
    return []
