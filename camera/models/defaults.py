"""What config.json may leave unsaid: transformers' config class then decides."""

import copy
from typing import Any

from camera.errors import CameraError
from camera.models.family import Family

_OF_EVERY_FAMILY = ("max_position_embeddings", "rms_norm_eps")


def completed(family: Family, config: dict[str, Any], where: str, most_layers: int) -> dict[str, Any]:
    """A config.json with the keys that are asked for here and are not in it, as transformers' config class has them.

    Args:
        family: of the model.
        config: of it.
        where: the file, for messages.
        most_layers: a config of more, of which transformers might make lists, is given back as it is.

    Raises:
        CameraError: if transformers refuses the values.
    """
    missing = [key for key in (*_OF_EVERY_FAMILY, *family.left_out) if key not in config]
    layers = config.get("num_hidden_layers")
    if not missing or not isinstance(layers, int) or layers > most_layers:
        return config
    from transformers import CONFIG_MAPPING  # heavy; most models say all

    family.register()
    try:
        known = CONFIG_MAPPING[family.model_type].from_dict(copy.deepcopy(config)).to_dict()
    except Exception as error:  # its checked dataclasses raise types of their own
        raise CameraError(f"{where} is refused by transformers: {error}") from error
    return {**config, **{key: known[key] for key in missing if known.get(key) is not None}}
