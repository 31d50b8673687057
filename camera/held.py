"""Files that are read as they were hashed: what is opened, and what lies there afterwards, is held to what was hashed.

A file's identity tells whether it is the one that was hashed, and unchanged. Beside device, inode, size and time of change it
holds the time at which the inode changed (ctime), which no user can set: a file that was replaced or written to and put back
has another. Where a file system keeps no such time that could be relied on (of a network, FUSE), inode (not of FUSE), size and
time of change are compared, and the bytes are hashed again once the block that reads them is done.

What this cannot see: writing through a shared map of the file that was made before it was hashed, and a machine whose clock or
kernel is the attacker's.
"""

import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from io import BufferedReader
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Literal, NamedTuple, cast

from camera.digests import digest_open
from camera.errors import CameraError
from camera.identity import Identity, identities

_TICK_NS = 20_000_000
"""Of the clock that a kernel takes file times from: two changes within one have one ctime."""
_COARSE_NS = 2_000_000_000
"""The same where a file system keeps whole seconds."""


class SourceChangedError(CameraError):
    """A source is not what was hashed any more."""


_ANY = Identity(-1, -1, -1, -1, -1)
"""Of a file that may change."""


@dataclass(frozen=True)
class Held:
    """Some files of a folder, as they were when they were hashed."""

    folder: Path
    digests: dict[str, str]
    """Hex sha256 by relative name, sorted; none where the files were only noted."""
    identities: dict[str, tuple[Identity, Identity]] = field(repr=False)
    """Of the entry, which may be a link, and of the file, by name."""
    closed: Literal["", "here", "below"] = ""
    """Whether nothing else is read of the folder and the folders in it, or of all below it."""

    def only(self, names: Iterable[str]) -> "Held":
        """Hold these alone; the others may be read, and may change."""
        kept = frozenset(names)
        return replace(
            self,
            digests={name: digest for name, digest in self.digests.items() if name in kept},
            identities={
                name: both if name in kept else (_ANY, _ANY) for name, both in self.identities.items()
            },
        )

    @property
    def mark(self) -> dict[str, list[int]]:
        """Of every file that is held what stays the same when the machine starts again, as plain JSON."""
        return {name: [*entry[1:], *file[1:]] for name, (entry, file) in self._held()}

    def check(self, *, again: bool = True) -> None:
        """Compare the files that lie there now with those that were hashed.

        Args:
            again: hash those again whose times say too little.

        Raises:
            SourceChangedError: naming the first that was changed, replaced, or put back.
        """
        unsure = []
        for name, expected in self._held():
            path = self.folder / name
            try:
                found = identities(path)
            except OSError:
                raise _changed(path) from None
            if found != expected:
                raise _changed(path)
            if not all(each.is_sure for each in found):
                unsure.append(name)
        if again:
            now = hold(self.folder, self.digests.keys() & unsure).digests
            for name, digest in now.items():
                if digest != self.digests[name]:
                    raise _changed(self.folder / name)

    def _held(self) -> list[tuple[str, tuple[Identity, Identity]]]:
        return [(name, both) for name, both in self.identities.items() if both != (_ANY, _ANY)]


def hold(folder: Path, names: Iterable[str], closed: Literal["", "here", "below"] = "") -> Held:
    """Hash files of a folder, in threads, and note which they are; `closed` as of `Held`.

    Raises:
        SourceChangedError: if one changes meanwhile.
        OSError: if one cannot be read.
    """
    ordered = sorted(names)
    with ThreadPoolExecutor() as pool:  # hashlib releases the GIL
        found = list(pool.map(lambda name: _hashed(folder / name), ordered))
    return Held(
        folder,
        {name: digest for name, (digest, _) in zip(ordered, found, strict=True)},
        {name: both for name, (_, both) in zip(ordered, found, strict=True)},
        closed,
    )


def note(folder: Path, names: Iterable[str]) -> Held:
    """Note which files of a folder lie there, without reading them: `check` tells whether they stay."""
    return Held(folder, {}, {name: identities(folder / name) for name in sorted(names)})


def _hashed(path: Path) -> tuple[str, tuple[Identity, Identity]]:
    with path.open("rb", buffering=0) as file:
        _let_the_clock_tick(os.fstat(file.fileno()))
        before = Identity.of(os.fstat(file.fileno()))
        digest = digest_open(file, before.size)
        after = Identity.of(os.fstat(file.fileno()))
    both = identities(path)
    if before != after or before.like(both[1]) != both[1]:
        raise SourceChangedError(
            f"{path} changes while it is hashed: wait until it is written, and run again"
        )
    return digest, both


def _let_the_clock_tick(status: os.stat_result) -> None:
    """Wait until a change from now on would have another time than the last one."""
    tick = _TICK_NS if status.st_ctime_ns % 1_000_000_000 else _COARSE_NS
    age = time.time_ns() - status.st_ctime_ns
    if 0 <= age < tick:
        time.sleep((tick - age) / 1e9)


def _changed(path: Path) -> SourceChangedError:
    return SourceChangedError(
        f"{path} was changed or replaced while the run was reading it, perhaps put back since: nothing that was made of it is "
        "kept. Leave it alone and run again"
    )


class _Expected(NamedTuple):
    """What is to be found at an absolute path: a file, or None for a folder of which nothing else is read."""

    path: str
    file: Identity | None
    below: bool = False
    """Of a folder: in folders below it too, however deep. Else in those directly in it alone."""


class _Now(NamedTuple):
    """All that is expected. Never changed but exchanged: a forked child may read it whatever another thread was doing."""

    expected: Counter[_Expected]
    files: dict[str, set[Identity]]
    closed: frozenset[_Expected]


_now = _Now(Counter(), {}, frozenset())
_lock = Lock()
_noticed: list[str] = []
"""Files that were opened and were not what was hashed."""


@contextmanager
def holding(*sources: Held, again: bool = True) -> Iterator[None]:
    """While the block runs, every file of the sources that `opened` opens is the one that was hashed; it is looked at before
    and after too.

    Args:
        sources: what the block reads.
        again: hash those again, after the block, whose times say too little; needless where nothing is made of them.

    Raises:
        SourceChangedError: if a file is not what was hashed.
    """

    listed, begun = list(_expectations(sources)), len(_noticed)
    paths = {each.path for each in listed}

    def check(again: bool = False) -> None:
        for source in sources:
            source.check(again=again)
        for path in _noticed[begun:]:  # whoever took the error for another
            if path in paths or os.path.dirname(path) in paths:
                raise _changed(Path(path))

    check()
    with expecting(listed):
        try:
            yield
        except SourceChangedError:
            raise
        except Exception:  # of a source that changed, nearly any; then that is what to say
            check()
            raise
    check(again)


def _expectations(sources: Iterable[Held]) -> Iterator[_Expected]:
    for source in sources:
        here = os.path.abspath(source.folder)
        if source.closed:
            yield _Expected(here, None, source.closed == "below")
        for name, (_, file) in source.identities.items():
            yield _Expected(os.path.join(here, name), file)


def expected_now() -> list[_Expected]:
    """What is expected in this process, for one that it starts."""
    return list(_now.expected)


@contextmanager
def expecting(expected: Iterable[_Expected]) -> Iterator[None]:
    """While the block runs, `opened` opens at these places what is expected there."""
    listed = Counter(expected)
    _exchange(lambda before: before + listed)
    try:
        yield
    finally:
        _exchange(lambda before: before - listed)


def _exchange(change: Callable[[Counter[_Expected]], Counter[_Expected]]) -> None:
    global _now
    with _lock:
        expected, files = change(_now.expected), dict[str, set[Identity]]()
        for each in expected:
            if each.file is not None:
                files.setdefault(each.path, set()).add(each.file)
        _now = _Now(expected, files, frozenset(each for each in expected if each.file is None))


def opened(path: Path | str, buffering: int = -1) -> BufferedReader:
    """Open a file to read bytes of it; if it is held, the very file that was hashed.

    Raises:
        SourceChangedError: if it is another, was changed, or was not there.
        OSError: if it cannot be opened.
    """
    file = cast("BufferedReader", open(path, "rb", buffering=buffering))  # noqa: SIM115
    try:
        if _now.expected:
            _compare(file, os.path.abspath(path), _now)
    except BaseException:
        file.close()
        raise
    return file


def _compare(file: BufferedReader, path: str, now: _Now) -> None:
    if path not in now.files:
        if any(_is_in(path, folder) for folder in now.closed):
            _noticed.append(path)
            raise SourceChangedError(
                f"{path} was not there when its folder was hashed: leave the folder alone and run again"
            )
        return
    found = Identity.of(os.fstat(file.fileno()))
    if any(found.like(held) != held for held in now.files[path]):
        _noticed.append(path)
        raise _changed(Path(path))


def _is_in(path: str, folder: _Expected) -> bool:
    inside = path.removeprefix(folder.path + os.sep)
    return inside != path and (folder.below or inside.count(os.sep) <= 1)


@contextmanager
def own_copy(folder: Path) -> Iterator[Path]:
    """A folder for a library that opens its files itself: copies of all that is held of it but weights, or the folder itself
    where nothing is.

    Raises:
        SourceChangedError: if a file is not what was hashed.
    """
    here = os.path.abspath(folder) + os.sep
    names = [path.removeprefix(here) for path in _now.files if path.startswith(here)]
    if not names:
        yield folder
        return
    with TemporaryDirectory(prefix="camera-") as scratch:
        for name in names:
            if not name.endswith(".safetensors"):
                target = Path(scratch, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                with opened(folder / name) as file, target.open("wb") as out:
                    shutil.copyfileobj(file, out)
        yield Path(scratch)
