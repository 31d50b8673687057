"""The digests of one audit: every file is read and hashed once, in threads, before anybody asks for them."""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from camera.digests import digest_file, files_below
from tasks.store import LINEAGE, MANIFEST, Store


class Hashing:
    """Files being hashed, by path. Whoever asks for a digest waits for that file alone."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._digests: dict[Path, Future[str]] = {}

    def begin(self, paths: Iterable[Path]) -> None:
        """Begin to hash, the largest first, so that no thread is left alone with a large one at the end."""
        sizes = {path: path.stat().st_size for path in paths if path.is_file()}
        for path in sorted(sizes, key=lambda path: -sizes[path]):
            self._of(path)

    def digests(self, folder: Path, names: Iterable[str]) -> dict[str, str]:
        """Hex sha256 of several files of one folder, by relative name, sorted by name.

        Raises:
            OSError: if one cannot be read.
        """
        ordered = sorted(names)
        found = [self._of(folder / name) for name in ordered]
        return {name: future.result() for name, future in zip(ordered, found, strict=True)}

    def _of(self, path: Path) -> Future[str]:
        if path not in self._digests:
            self._digests[path] = self._pool.submit(digest_file, path)
        return self._digests[path]


@dataclass(frozen=True)
class Evidence:
    """What an audit reads again."""

    store: Store
    hashes: Hashing
    from_remote: bool = False
    """Whether what DVC versions is read from its remote, whatever is here."""


@contextmanager
def reading_ahead() -> Iterator[Hashing]:
    """Threads that hash for as long as the block lasts; what was not begun when it ends is not done."""
    pool = ThreadPoolExecutor()
    try:
        yield Hashing(pool)
    finally:
        pool.shutdown(cancel_futures=True)


def files_of(lineage: dict[str, Any], store: Store) -> Iterator[Path]:
    """The files of a lineage's stages and sources that are on this machine."""
    for key, entry in lineage["stages"].items():
        folder = store.path(entry["stage"], key)
        if (folder / MANIFEST).is_file():
            yield from (folder / name for name in files_below(folder) if name not in (MANIFEST, LINEAGE))
    for entry in lineage["sources"].values():
        path = Path(entry["path"])
        yield from (source_folder(path) / name for name in entry["files"])


def source_folder(path: Path) -> Path:
    """The folder that a source's files are named from; a source may be a single file."""
    return path if path.is_dir() else path.parent
