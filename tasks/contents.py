"""What lies in a folder that others may have written: regular files, and all else by its kind. No link is followed."""

import os
import stat
from pathlib import Path

EMPTY = "an empty folder"
_KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a link",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def kind(path: Path) -> str | None:
    """What a path is, without opening or following it: `a file`, `a folder`, `a link`; None if there is nothing.

    A link into the cache of the DVC repository that it is in is a file: `dvc config cache.type symlink` puts it there.
    """
    try:
        mode = os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        return f"what cannot be looked at ({error})"
    if stat.S_ISLNK(mode) and _cached(path):
        return "a file"
    return _KINDS.get(stat.S_IFMT(mode), "no file")


def place(path: Path) -> Path:
    """Where a path is, as publishing records it: links above it are followed, and it itself is not."""
    try:
        if path.name in ("", ".."):
            return Path(os.path.realpath(path))
        return Path(os.path.realpath(path.parent), path.name)
    except ValueError:  # a NUL in it: it is nowhere
        return path


def followed(path: Path) -> Path:
    """What a link, `.` or `..` leads to in the end; all else is given as it is."""
    return Path(os.path.realpath(path)) if path.name in ("", "..") or kind(path) == "a link" else path


def contents(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Relative POSIX names of the regular files below a folder, sorted, and of all else what it is.

    Hidden files are files. Empty folders, and those that cannot be listed, are among all else. Nothing is opened.
    """
    files: list[str] = []
    beyond: dict[str, str] = {}
    waiting = [folder]
    while waiting:
        place = waiting.pop()
        name = place.relative_to(folder).as_posix()
        try:
            inside = sorted(place.iterdir())
        except OSError as error:
            beyond[name] = f"a folder that cannot be read ({error.strerror})"
            continue
        if not inside and place != folder:
            beyond[name] = EMPTY
        for path in inside:
            found = kind(path)
            if found == "a folder":
                waiting.append(path)
            elif found == "a file":
                files.append(path.relative_to(folder).as_posix())
            elif found is not None:  # else it went meanwhile
                beyond[path.relative_to(folder).as_posix()] = found
    return sorted(files), dict(sorted(beyond.items()))


def _cached(link: Path) -> bool:
    try:
        target = Path(os.path.realpath(link, strict=True))
    except OSError:  # a loop, or nothing
        return False
    repository = next((at for at in place(link).parents if (at / ".dvc" / "config").is_file()), None)
    inside = repository is not None and target.is_relative_to((repository / ".dvc" / "cache").resolve())
    return inside and target.is_file()
