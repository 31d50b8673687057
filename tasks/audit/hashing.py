"""The digests of one audit: every file is read and hashed once, in threads, before anybody asks for them."""

import os
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from camera.digests import digest_file
from camera.errors import CameraError
from tasks.lineage_form import read_lineage
from tasks.store import LINEAGE, MANIFEST, Artifact, Store


class Hashing:
    """Files being hashed, by path. Whoever asks for a digest waits for that file alone."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._digests: dict[Path, Future[str]] = {}

    def begin(self, paths: Iterable[Path]) -> None:
        """Begin to hash, the largest first, so that no thread is left alone with a large one at the end."""
        sizes: dict[Path, int] = {}
        for path in paths:
            with suppress(OSError):
                sizes[path] = path.stat().st_size
        for path in sorted(sizes, key=lambda path: -sizes[path]):
            self._of(path)

    def digests(self, folder: Path, names: Iterable[str]) -> dict[str, str]:
        """Hex sha256 of several files of one folder, by relative name, sorted by name.

        Raises:
            OSError: if one cannot be read, or is no file.
        """
        ordered = sorted(names)
        found = [self._of(folder / name) for name in ordered]
        return {name: future.result() for name, future in zip(ordered, found, strict=True)}

    def read(self, folder: Path, names: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
        """The same, and of the files that cannot be read why."""
        digests: dict[str, str] = {}
        unread: dict[str, str] = {}
        for name in sorted(names):
            try:
                digests |= self.digests(folder, [name])
            except OSError as error:
                unread[name] = error.strerror or str(error)
        return digests, unread

    def _of(self, path: Path) -> Future[str]:
        if path not in self._digests:
            self._digests[path] = self._pool.submit(_digest_regular, path)
        return self._digests[path]


def _digest_regular(path: Path) -> str:
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait, and a device may never end
        raise OSError(f"{path} is no regular file")
    return digest_file(path)


@dataclass(frozen=True)
class Evidence:
    """What an audit reads again, and what it holds against."""

    store: Store
    hashes: Hashing
    from_remote: bool = False
    """Whether what DVC versions is read from its remote, whatever is here."""
    everywhere: bool = False
    """Whether sources are looked at wherever a lineage says that they are, whoever wrote it."""

    def known(self, entry: dict[str, Any]) -> Artifact | None:
        """What this store says of an artifact with this key and digest, whole or evicted; its files are not read."""
        stage, key = entry["stage"], entry["key"]
        found = self.store.peek(stage, key) or self.store.evicted(stage, key)
        return found if found is not None and found.digest == entry["digest"] else None

    def recorded_paths(self, lineage: dict[str, Any], digest: str) -> list[str]:
        """Where this project itself read a source, as its store recorded it: a source may have been moved meanwhile."""
        found = dict[str, None]()
        for entry in lineage["stages"].values():
            if (known := self.known(entry)) is None:
                continue
            try:
                whole = digest_file(known.path / LINEAGE) == known.manifest["lineage_sha256"]
                source = read_lineage(known.path / LINEAGE)["sources"].get(digest) if whole else None
            except (CameraError, OSError):  # the part of the stage says so
                continue
            if source is not None:
                found[str(source["path"])] = None
        return list(found)


@contextmanager
def reading_ahead() -> Iterator[Hashing]:
    """Threads that hash for as long as the block lasts; what was not begun when it ends is not done."""
    pool = ThreadPoolExecutor()
    try:
        yield Hashing(pool)
    finally:
        pool.shutdown(cancel_futures=True)


def files_of_stages(lineage: dict[str, Any], store: Store) -> Iterator[Path]:
    """The files of a lineage's stages that are in the store."""
    for key, entry in lineage["stages"].items():
        if (found := store.peek(entry["stage"], key)) is not None:
            yield from (
                found.path / name for name in found.manifest["files"] if name not in (MANIFEST, LINEAGE)
            )
