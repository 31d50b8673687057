"""The tokenizer of a model folder, loaded natively: no remote code."""

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from camera.checkpoints.kinds import LFS_POINTER
from camera.checkpoints.trust import refuse_outside_files, refuse_outside_links
from camera.errors import CameraError
from camera.files import read_json
from camera.guarded import Limits, run_guarded
from camera.held import own_copy
from camera.models import family_of
from camera.units import few

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)
_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")
_LOADING_SECONDS = 45.0
_LOADING_TIMES = 16
"""Memory for a byte of those files; the largest in use (256,000 tokens, 500,000 merges, 40 MB) take half of it."""


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a folder with config.json and tokenizer files (a checkpoint, or a quantised model).

    It is loaded in a child process first, so that one which ends the library, or takes all memory, does so there.

    Raises:
        CameraError: if there is none, it costs too much to load, or its ids do not fit the embedding.
    """
    from transformers import AutoTokenizer  # heavy; only text needs it

    if not folder.is_dir():
        raise CameraError(f"{folder} is not a folder: give the folder of a model, or of its tokenizer")
    refuse_outside_links(folder)
    refuse_outside_files(folder)
    config = read_json(folder / "config.json")
    family_of(config, str(folder / "config.json")).register()
    for path in folder.glob("token*"):
        if path.is_file() and path.stat().st_size < 1024 and path.read_bytes().startswith(LFS_POINTER):
            raise CameraError(f"{path} is a pointer of Git LFS and no tokenizer: `git lfs pull` fetches it")

    def load() -> "PreTrainedTokenizerBase":
        try:
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False, local_files_only=True)
            tokenizer.name_or_path = str(folder)
            return tokenizer
        except CameraError:
            raise
        except (
            Exception
        ) as error:  # the library raises nearly any type here, and all mean the same to the user
            raise CameraError(f"{folder}: the tokenizer cannot be loaded ({error})") from error

    with own_copy(folder) as place:  # here, since a child that is ended leaves its copy behind
        _try(folder, load, _files_of(folder))
        tokenizer = load()
    _check_rows(folder, tokenizer, int(config["vocab_size"]))
    return tokenizer


_tried: set[tuple[object, ...]] = set()
"""Folders whose tokenizer was loaded before in this process, by their files: a run opens its tokenizer many times."""


def _try(folder: Path, load: Callable[[], "PreTrainedTokenizerBase"], files: tuple[object, ...]) -> None:
    if files not in _tried:
        run_guarded(
            lambda: len(load().get_added_vocab()),
            f"{folder}: the tokenizer cannot be loaded",
            _limits(folder),
        )
        _tried.add(files)


def _limits(folder: Path) -> Limits:
    size = sum(path.stat().st_size for form in _FILES for path in folder.glob(form) if path.is_file())
    return Limits(Limits().memory_bytes + _LOADING_TIMES * min(size, 128 << 20), _LOADING_SECONDS)


def _files_of(folder: Path) -> tuple[object, ...]:
    """What lies in a folder, by name, file and time of change."""
    found = ((path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file())
    return tuple((name, at.st_dev, at.st_ino, at.st_size, at.st_mtime_ns) for name, at in found)


def _check_rows(folder: Path, tokenizer: "PreTrainedTokenizerBase", rows: int) -> None:
    """Hold a tokenizer against the embedding: what was added to it and has no row may stay, as long as no text uses it."""
    if len(tokenizer) <= rows:
        return
    added = {id: token for token, id in tokenizer.get_added_vocab().items()}
    beyond = range(rows, len(tokenizer))
    needed = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    if not set(beyond) <= added.keys() - needed:
        raise CameraError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens and the embedding {rows} rows "
            "(vocab_size): this tokenizer belongs to another model"
        )
    _tell_without_row(folder, tuple(added[id] for id in beyond))


@cache
def _tell_without_row(folder: Path, tokens: tuple[str, ...]) -> None:
    """Once in a process: a run opens its tokenizer many times."""
    _log.warning(
        "%s: the tokenizer has %s, for which the embedding has no row: text with it is refused, and a GGUF file leaves it out",
        folder,
        few([repr(token) for token in tokens]),
    )
