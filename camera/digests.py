"""Content digests: the identity of everything the pipeline reads or makes."""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any

_CHUNK_BYTES = 8 << 20


def canonical_json(value: Any) -> str:
    """The one text of a JSON value: keys sorted, no spaces, UTF-8, no NaN.

    Raises:
        ValueError: for NaN or infinity, which JSON cannot hold.
        TypeError: for values that are not plain JSON.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest_json(value: Any) -> str:
    """Hex sha256 of the canonical text of a JSON value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def digest_file(path: Path) -> str:
    """Hex sha256 of a file's bytes, read in chunks."""
    with path.open("rb", buffering=0) as file:
        return digest_open(file, os.fstat(file.fileno()).st_size)


def digest_open(file: FileIO, size: int) -> str:
    """Hex sha256 of an open file's bytes from where it is, of which `size` are expected."""
    digest = hashlib.sha256()
    # One buffer, larger than the 256 kB of hashlib.file_digest: between two chunks a thread waits for the GIL.
    buffer = memoryview(bytearray(min(_CHUNK_BYTES, size + 1)))
    while count := file.readinto(buffer):
        digest.update(buffer[:count])
    return digest.hexdigest()


def copy_hashed(source: Path, target: Path) -> str:
    """Copy a file's bytes, and give the hex sha256 of those that were copied."""
    digest = hashlib.sha256()
    with source.open("rb", buffering=0) as file, target.open("wb", buffering=0) as copy:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            view = memoryview(chunk)
            while view:
                view = view[copy.write(view) :]
    return digest.hexdigest()


def digest_files(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Hex sha256 of several files of one folder, by relative name; hashed in threads, sorted by name."""
    ordered = sorted(names)
    with ThreadPoolExecutor() as pool:  # hashlib releases the GIL, so threads do scale here
        return dict(zip(ordered, pool.map(lambda name: digest_file(folder / name), ordered), strict=True))


def files_below(folder: Path) -> list[str]:
    """Relative POSIX names of all regular files below a folder, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def digest_folder(folder: Path) -> str:
    """Hex sha256 of a folder's content: of the canonical JSON that maps each file name to its sha256."""
    return digest_json(digest_files(folder, files_below(folder)))
