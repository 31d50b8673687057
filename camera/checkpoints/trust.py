"""What a model folder from elsewhere may not do: reach for files outside it."""

import os
import stat
from pathlib import Path
from typing import Any

from camera.errors import CameraError
from camera.files import read_json

TEMPLATES = "additional_chat_templates"
"""The only folder in a model's folder of which anything is read."""


def refuse_outside_links(folder: Path) -> None:
    """Look at every entry of a model folder before anything of it is opened.

    A link may point inside the folder, or to the blobs of the same repository in the Hugging Face cache. Others would
    have us read, copy and publish any file of this machine.

    Raises:
        CameraError: naming a link that leaves the folder, or an entry that is neither file nor folder.
    """
    here = folder.resolve()
    for path in sorted((*folder.iterdir(), *(folder / TEMPLATES).glob("*"))):
        if path.is_symlink():
            target = Path(os.path.realpath(path))
            blobs = here.parents[1] / "blobs" if here.parent.name == "snapshots" else here
            if not (target.is_relative_to(here) or target.is_relative_to(blobs)):
                raise CameraError(
                    f"{path} is a link to {target}, outside the model's folder: put a copy of the file in its place "
                    "if you trust it"
                )
            if not target.exists():
                raise CameraError(
                    f"{path} is a link to {target}, which does not exist: fetch the model again"
                )
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise CameraError(f"{path} is neither a file nor a folder: a model holds nothing else, remove it")


def refuse_outside_files(folder: Path) -> None:
    """Refuse a tokenizer_config.json that names files elsewhere: transformers would read them.

    Raises:
        CameraError: naming the key.
    """
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    config = read_json(path)
    for key, value in config.items() if isinstance(config, dict) else ():
        if key.endswith("_file") and not is_plain_name(value):
            raise CameraError(
                f"{path}: {key} is {value!r}, and may only name a file beside it: remove the key"
            )


def is_plain_name(value: Any) -> bool:
    """Whether a value names a file in a folder, and none elsewhere; None names none."""
    return value is None or (
        isinstance(value, str) and value not in ("", "..") and "\0" not in value and Path(value).name == value
    )
