"""A published folder held while it is judged: nobody publishes into it, and what was judged is what is there afterwards."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from camera.disk import READ_ONLY
from camera.errors import CameraError
from camera.locks import output_lock
from tasks import contents

_State = tuple[int, ...]


@contextmanager
def held(folder: Path, place: Path | None = None) -> Iterator[Callable[[], None]]:
    """Hold a folder, and give a function that ends with an error if anything in it changed since.

    Our own processes wait for each other. Others are seen by what the kernel keeps of every file: which it is, its size,
    and when its content or its name, owner and rights last changed, which nobody can set back.

    Args:
        folder: what is judged.
        place: where it was published, if this is a copy of it.

    Raises:
        CameraError: from the function, naming what changed.
    """
    with ExitStack() as stack:
        target = contents.place(place or folder)
        try:
            if target.parent.is_dir():
                stack.enter_context(output_lock(target, wait=True))
        except OSError as error:
            if error.errno not in READ_ONLY:  # where nobody of us can write, nobody of us publishes
                raise
        before = _states(folder)

        def unchanged() -> None:
            now = _states(folder)
            if now != before:
                names = sorted(
                    name for name in before.keys() | now.keys() if before.get(name) != now.get(name)
                )
                raise CameraError(
                    f"{folder / names[0]} changed while it was looked at: run the same command again"
                )

        yield unchanged


def _states(folder: Path) -> dict[str, _State]:
    found: dict[str, _State] = {}
    for at, folders, files in os.walk(folder):
        for name in (".", *folders, *files):
            path = os.path.join(at, name)
            try:
                state = os.lstat(path)
            except OSError:
                continue
            # A folder's own times change with every lock file and cache of ours beside it; what is in it is looked at.
            times = () if os.path.isdir(path) else (state.st_size, state.st_mtime_ns, state.st_ctime_ns)
            found[os.path.relpath(path, folder)] = (state.st_dev, state.st_ino, state.st_mode, *times)
    return found
