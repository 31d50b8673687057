"""What a GGUF file says of a model for people and samplers: licence, languages, origin, and how to sample."""

import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import yaml

from camera.errors import CameraError
from camera.files import copy_file, read_json

_log = logging.getLogger(__name__)
_OF_CARD = ("license", "license_name", "license_link", "languages", "base_models", "datasets", "tags")
_SAMPLING: dict[str, tuple[str, type]] = {
    "top_k": ("top_k", int),
    "top_p": ("top_p", float),
    "min_p": ("min_p", float),
    "temperature": ("temp", float),
    "repetition_penalty": ("penalty_repeat", float),
}
"""Keys of generation_config.json, with their names below `general.sampling` and their types."""

_MOST_README_BYTES = 8 << 20
"""A larger one is no card, and is left aside."""


def model_facts(folder: Path) -> gguf.Metadata:
    """What the front matter of README.md and generation_config.json say; a name is left to the caller.

    Raises:
        CameraError: if generation_config.json cannot be read.
    """
    found = gguf.Metadata()
    try:
        readme = folder / "README.md"
        read = readme.is_file() and readme.stat().st_size <= _MOST_README_BYTES
        card = _card(readme) if read else {}
        of_card = gguf.Metadata.apply_metadata_heuristic(gguf.Metadata(), card)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:
        _log.warning(
            "%s: the front matter is left out, for it cannot be read (%s)", folder / "README.md", error
        )
        of_card = gguf.Metadata()
    for key in _OF_CARD:
        setattr(found, key, _strings(getattr(of_card, key)))
    path = folder / "generation_config.json"
    generation = read_json(path) if path.is_file() else {}
    if not isinstance(generation, dict):
        raise CameraError(f"{path} does not hold a JSON object: copy it from the source model again")
    for key, (name, kind) in _SAMPLING.items():
        value = generation.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            setattr(found, f"sampling_{name}", kind(value))
    return found


def _card(readme: Path) -> dict[str, Any]:
    """The front matter; the library, which opens the file itself, is given a copy of what was hashed."""
    with TemporaryDirectory(prefix="camera-") as scratch:
        copy_file(readme, Path(scratch, "README.md"))
        return gguf.Metadata.load_model_card(Path(scratch))


def _strings(value: Any) -> Any:
    """Only texts, lists of texts and objects of texts, which is all that GGUF's keys of this kind hold."""
    if isinstance(value, list):
        return [kept for item in value if (kept := _strings(item))] or None
    if isinstance(value, dict):
        return {key: str(item) for key, item in value.items()}
    return None if value is None else str(value)
