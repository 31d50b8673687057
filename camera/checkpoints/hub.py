"""A model by name: a folder that is here, or a repository on the Hugging Face hub."""

import re
from pathlib import Path

from camera.errors import CameraError, NetworkError
from camera.hub_client import set_timeouts

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_WANTED = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py", "LICENSE*", "README.md")


def local_checkpoint(model: str, revision: str | None = None, *, fetch: bool = True) -> Path:
    """The folder of a model: `model` itself if it is a folder, else a download of that hub repository.

    Args:
        model: a path, or `organisation/name` on the hub.
        revision: for the hub: a commit, so that tomorrow's run reads the same bytes.
        fetch: whether to download what is not in the hub's cache on this machine.

    Raises:
        CameraError: if it is neither a folder nor a hub id.
        NetworkError: if the hub cannot be reached.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    if not _HUB_ID.fullmatch(model) or model.startswith((".", "/")) or folder.parent.is_dir():
        raise CameraError(f"model: {model} is not a folder here, nor an `organisation/name` on the hub")
    from huggingface_hub import snapshot_download  # heavy, and most models are folders

    set_timeouts()
    try:
        wanted = list(_WANTED)
        return Path(
            snapshot_download(model, revision=revision, allow_patterns=wanted, local_files_only=not fetch)
        )
    except Exception as error:  # besides its own types those of its transport, which it lets through
        raise NetworkError(
            f"model: {model} is no folder here and the hub did not give it ({type(error).__name__}: {error}). "
            "Download it where there is a network and give its folder"
        ) from None
