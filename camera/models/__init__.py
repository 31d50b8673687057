"""The model families: one file each, found here by the `model_type` of config.json."""

from typing import Any

from camera.errors import CameraError
from camera.models import llama, pangu, qwen
from camera.models.family import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (pangu.FAMILY, llama.FAMILY, qwen.QWEN2, qwen.QWEN3)
}


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


__all__ = ["FAMILIES", "Family", "family_of"]
