"""The model families: one file each, found by the `model_type` of config.json or the architecture of a GGUF file."""

import re
from collections.abc import Iterable
from typing import Any

from camera.errors import CameraError, understood
from camera.models.block import Block, Fused
from camera.models.experts import Experts
from camera.models.family import FAMILIES, Family, named_weights
from camera.models.weight import Placed, Weight

_FUSED = "its checkpoints hold all experts of a layer in one tensor, and experts are pruned one by one"
_NO_CLASS = (
    "transformers has no class of it, and no code of a checkpoint is run; take a newer model of the family, or the "
    "publisher's conversion to the layout of Llama"
)
_WITH_IMAGES = (
    "its config.json is of a model of text and images; save its text model alone, as {}, and take that"
)
_REFUSED = {
    **dict.fromkeys(("minicpm", "internlm2", "exaone", "chatglm", "qwen", "baichuan"), _NO_CLASS),
    "gemma3": _WITH_IMAGES.format("gemma3_text"),
    "mistral3": _WITH_IMAGES.format("mistral"),
    "gpt_oss": f"{_FUSED}; they are stored in MXFP4 besides",
    "granitemoe": _FUSED,
    "granitemoeshared": _FUSED,
}


def family_of(config: dict[str, Any], where: str = "config.json") -> Family:
    """The family of a config.json.

    Raises:
        CameraError: for a family that is not supported, or a model of one that is and cannot be worked with.
    """
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in _REFUSED:
        raise CameraError(f"{where}: {model_type} is not supported: {_REFUSED[model_type]}")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        if isinstance(text := config.get("text_config"), dict):
            raise CameraError(
                f"{where}: {model_type} is a model of text and more, with a {text.get('model_type')} in it: give a folder of "
                "its language model alone (in transformers: model.language_model, saved as a causal language model)"
            )
        raise CameraError(
            f"{where}: model_type {model_type!r} is not supported; supported are {', '.join(FAMILIES)}"
        )
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise CameraError(
            f"{where} has a quantization_config ({method}): the weights are quantised already, and what is measured and "
            "pruned are floating-point numbers. Dequantise the checkpoint to bfloat16 first, or take the original"
        )
    family = FAMILIES[model_type]
    with understood(where):
        reason = family.refuses(config)
    if reason is not None:
        raise CameraError(f"{where}: {reason}")
    return family


def family_of_architecture(architecture: str, where: str, tensors: Iterable[str]) -> Family:
    """The family of a GGUF file's `general.architecture`.

    Args:
        architecture: of the file.
        where: the file, for messages.
        tensors: the names of its tensors: of families that share an architecture, the one is taken that has a
            place for most of them, and few others.

    Raises:
        CameraError: for an architecture that no supported family has.
    """
    families = [
        family
        for family in FAMILIES.values()
        if family.gguf_architecture == architecture and family.gguf_rules.reads_back
    ]
    if not families:
        known = sorted({family.gguf_architecture for family in FAMILIES.values() if family.gguf_architecture})
        raise CameraError(
            f"{where}: architecture {architecture!r} is not supported; supported are {', '.join(known)}"
        )
    names = {re.sub(r"^blk\.\d+\.", "blk.{layer}.", name) for name in tensors}

    def misfit(family: Family) -> tuple[int, bool, int]:
        known = {name for weight in family.weights for name in weight.stored}
        return len(names - known), family.experts is not None, len(known - names)

    return min(families, key=misfit)


__all__ = [
    "FAMILIES",
    "Block",
    "Experts",
    "Family",
    "Fused",
    "Placed",
    "Weight",
    "family_of",
    "family_of_architecture",
    "named_weights",
]
