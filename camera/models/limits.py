"""What the numbers of a config.json may be at all, whoever wrote it: held before anything is built of them."""

from collections.abc import Mapping
from math import isfinite
from typing import Any

from camera.errors import CameraError
from camera.models.family import Family, named_weights

_MOST = (1 << 31) - 1
"""llama.cpp and torch count with 32 bits."""
_ALWAYS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
_WHOLE = (
    *("num_key_value_heads", "head_dim", "intermediate_size", "max_position_embeddings"),
    *("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    "original_max_position_embeddings",
)
"""Whole numbers above zero where they are given; null is as if they were not. Of some, a list with one for every layer.
Numbers of experts are judged in `camera.models.experts`."""
_NUMBERS = (
    *("rms_norm_eps", "layer_norm_eps", "rope_theta", "rope_local_base_freq", "partial_rotary_factor"),
    *("routed_scaling_factor", "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"),
    *("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling", "logit_scale"),
    "initializer_range",
)
_LISTS = ("layer_types", "architectures", "mlp_layer_types", "no_rope_layers")
_OBJECTS = ("rope_scaling", "rope_parameters", "auto_map")
_TEXTS = ("hidden_act", "torch_dtype", "dtype", "scoring_func", "topk_method")
_SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias", "norm_topk_prob", "use_sliding_window")
MOST_LAYERS_FOR_EACH = 16
"""Most layers times experts for each tensor: families have three tensors for every expert, of at least every fifth layer."""


def check_config(config: Any, where: str) -> dict[str, Any]:
    """A config.json whose values are of the kinds that they must be.

    Args:
        config: what the file holds.
        where: the file, for messages.

    Raises:
        CameraError: naming the first key whose value no model can have.
    """
    if not isinstance(config, dict):
        raise CameraError(f"{where} does not hold a JSON object: fetch it again")
    for key in _ALWAYS:
        _check(where, key, config.get(key), _is_whole(config.get(key)), "not a positive integer")
    for key in _WHOLE:
        value = config.get(key)
        each = value if isinstance(value, list) else [value]
        fits = value is None or (all(map(_is_whole, each)) and bool(each))
        # 0 is how some configs say that there is none.
        _check(where, key, value, fits or value == 0, "not a positive integer")
    for key in _NUMBERS:
        value = config.get(key)
        fits = value is None or (type(value) in (int, float) and isfinite(value) and abs(value) < 1e38)
        _check(where, key, value, fits, "not a number that is computed with")
    for keys, kind, name in (
        (("sliding_window",), int, "whole number"),
        (_LISTS, list, "list"),
        (_OBJECTS, dict, "object"),
        (_TEXTS, str, "text"),
        (_SWITCHES, bool, "true or false"),
    ):
        for key in keys:
            _check(where, key, config.get(key), isinstance(config.get(key), kind | None), f"no {name}")
    if config["num_attention_heads"] > config["hidden_size"]:
        raise CameraError(
            f"{where}: num_attention_heads is {config['num_attention_heads']}, more than the hidden_size"
        )
    return config


def _is_whole(value: Any) -> bool:
    return type(value) is int and 0 < value <= _MOST


def _check(where: str, key: str, value: Any, fits: bool, problem: str) -> None:
    if not fits:
        raise CameraError(
            f"{where}: {key} is {value!r:.60}, {problem}: fetch it again from where the model is from"
        )


def check_counts(family: Family, config: Mapping[str, Any], tensors: int, where: str) -> None:
    """Refuse a config of more layers and experts than there are tensors: a billion empty ones would be built first.

    Args:
        family: of the model.
        config: of `check_config`.
        tensors: how many the files hold.
        where: the file, for messages.
    """
    layers, experts = config["num_hidden_layers"], 1
    counts = {"num_hidden_layers": layers}
    if family.experts is not None:
        experts = family.experts.count(config)
        counts[family.experts.count_key(config)] = experts
        if (problem := family.experts.problem(config)) is not None:
            raise CameraError(f"{where}: {problem}")
    for key, count in counts.items():
        if count > tensors:
            raise CameraError(
                f"{where}: {key} is {count}, and the files hold {tensors} tensors: config and weights do not belong together"
            )
    if layers * experts > MOST_LAYERS_FOR_EACH * tensors:
        raise CameraError(
            f"{where}: {layers} layers of {experts} experts, and the files hold {tensors} tensors: config and weights do not "
            "belong together"
        )


def check_shapes(
    family: Family, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Compare the tensors that are there with what a config asks for.

    Args:
        family: of the model.
        config: of `check_counts`.
        shapes: of tensors by name.
        where: the folder, for messages.

    Raises:
        CameraError: naming the first tensor that is missing, of another shape, or that the family has no place for.
    """
    known = named_weights(family, config)
    for name in family.names(config):
        if name not in shapes:
            raise CameraError(f"{where}: {name} is missing, and config.json asks for it")
    for name, found in shapes.items():
        if name not in known:
            raise CameraError(f"{where}: {name} has no place in a {family.model_type} of this config.json")
        if (expected := family.shape(config, known[name].weight)) != found:
            raise CameraError(
                f"{where}: {name} has shape {list(found)} and config.json asks for {list(expected)}: config and weights do "
                "not belong together"
            )
