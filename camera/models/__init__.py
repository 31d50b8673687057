"""The model families: one file each, found by the `model_type` of config.json or the architecture of a GGUF file."""

from typing import Any

from camera.errors import CameraError
from camera.models.family import FAMILIES, Block, Experts, Family, Placed, Weight, named_weights


def family_of(config: dict[str, Any], where: str = "config.json") -> Family:
    """The family of a config.json.

    Raises:
        CameraError: for a family that is not supported.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CameraError(
            f"{where}: model_type {model_type!r} is not supported; supported are {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


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


__all__ = [
    "FAMILIES",
    "Block",
    "Experts",
    "Family",
    "Placed",
    "Weight",
    "family_of",
    "family_of_architecture",
    "named_weights",
]
