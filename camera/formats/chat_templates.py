"""The chat templates of a model's folder, wherever transformers finds them."""

from pathlib import Path
from typing import Any

from camera.errors import CameraError
from camera.files import read_json
from camera.held import opened

DEFAULT = "default"
_MAX_BYTES = 8 << 20
"""The longest in use has a hundredth of it."""
_MAX_BYTES = 4 << 20


def chat_templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Templates by name; the one named `default`, if there is any, stands first.

    Of the same name a file chat_template.jinja or in additional_chat_templates/ wins over tokenizer_config.json, and that
    over chat_template.json.

    Args:
        folder: of the model.
        config: tokenizer_config.json.

    Raises:
        CameraError: if a file holds something else.
    """
    found: dict[str, str] = {}
    path = folder / "chat_template.json"
    if path.is_file():
        content = read_json(path)
        found |= _stated(content.get("chat_template") if isinstance(content, dict) else content, path)
    found |= _stated(config.get("chat_template"), folder / "tokenizer_config.json")
    files = {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    files[DEFAULT] = folder / "chat_template.jinja"
    for name, file in files.items():
        if file.is_file():
            if file.stat().st_size > _MAX_BYTES:
                raise CameraError(
                    f"{file} has more than {_MAX_BYTES} bytes, which no template has: remove it"
                )
            try:
                with opened(file) as stored:
                    text = stored.read(_MAX_BYTES + 1)
                if len(text) > _MAX_BYTES:
                    raise CameraError(
                        f"{file} is longer than any chat template: remove it, or fetch it again"
                    )
                found[name] = text.decode("utf-8")
            except UnicodeDecodeError:
                raise CameraError(f"{file} is not UTF-8 text: copy it from the source model again") from None
    return {name: found[name] for name in sorted(found, key=lambda name: (name != DEFAULT, name))}


def _stated(value: Any, path: Path) -> dict[str, str]:
    """One template, or a list of named ones, or an object of them."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {DEFAULT: value}
    try:
        pairs = (
            value.items() if isinstance(value, dict) else [(each["name"], each["template"]) for each in value]
        )
        return {str(name): str(template) for name, template in pairs}
    except (KeyError, TypeError):
        raise CameraError(f"{path}: chat_template is neither a text nor a list of named ones") from None
