"""Files that are either whole or not there: written to a temporary sibling, fsynced, renamed into place."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from camera.errors import CameraError


def sync(path: Path) -> None:
    """fsync one file or directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """fsync every file and directory below a folder, then the folder."""
    for path in sorted(folder.rglob("*"), reverse=True):
        sync(path)
    sync(folder)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary sibling to write to; when the block ends well it becomes `path`, else it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a temporary sibling folder to fill; when the block ends well it becomes `path`, else it is removed.

    Raises:
        CameraError: if `path` exists and is not an empty folder.
    """
    refuse_occupied(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        sync_tree(temporary)
        if path.exists():
            path.rmdir()
        temporary.rename(path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_occupied(path: Path) -> None:
    """Raise CameraError if an output path exists with content: nothing is ever overwritten."""
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise CameraError(f"{path} already exists and is not empty: choose another output path, or remove it")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON value, indented and with a final newline, as a whole file."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        CameraError: if the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CameraError(f"{path} is missing") from None
    except OSError as error:
        raise CameraError(f"{path} cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, numbers or nesting beyond reason
        raise CameraError(f"{path} is not valid JSON: {error}") from None


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` hold the bytes of `source`: a hard link where the file system allows it, else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)  # a hub cache holds symbolic links: link what they mean
    except OSError:
        shutil.copyfile(source, target)
