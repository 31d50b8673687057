"""Disks that are full or cannot be written to, told in a way that somebody can mend."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from camera.errors import CameraError
from camera.units import bytes_text

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


class DiskError(CameraError):
    """A disk did not take what was to be written. What was finished before is kept."""

    def __init__(self, message: str, *, full: bool) -> None:
        self.full = full
        super().__init__(message)


@contextmanager
def told_of_disks(*places: Path) -> Iterator[None]:
    """Make a DiskError of the system's own error when a disk is full or read-only.

    Args:
        places: where the block writes, for errors that do not say which file they are about.

    Raises:
        DiskError: with the disk, what is free, and what to do.
    """
    try:
        yield
    except OSError as error:
        if (said := disk_error(error, *places)) is None:
            raise
        raise said from error


def disk_error(error: OSError, *places: Path) -> DiskError | None:
    """What to tell of an error if it is a disk's, else None."""
    if error.errno in FULL:
        place = _place(error, places)
        state = os.strerror(error.errno) if place is None else f"{place}: {_state(place, error)}"
        return DiskError(
            f"a file could not be written, {state}. Free some space and run the same command again: "
            "what is finished is kept",
            full=True,
        )
    if error.errno in READ_ONLY and error.filename is not None:
        return DiskError(
            f"{error.filename} cannot be written ({os.strerror(error.errno)}): mount its disk for writing, mend the "
            "rights, or choose another place (CAMERA_HOME for the store)",
            full=False,
        )
    return None


def _place(error: OSError, places: tuple[Path, ...]) -> Path | None:
    """The file that the error names; else, of the places, the one with least room."""
    named = error.filename2 or error.filename  # a copy fails for its target
    if isinstance(named, str | os.PathLike):
        return Path(named)
    return min(places, key=lambda place: shutil.disk_usage(_existing(place)).free, default=None)


def _state(place: Path, error: OSError) -> str:
    here = _existing(place)
    while not here.is_mount() and here != here.parent:
        here = here.parent
    usage = shutil.disk_usage(here)
    if error.errno == errno.ENOSPC:
        return f"the disk at {here} is full ({bytes_text(usage.free)} of {bytes_text(usage.total)} free)"
    return f"{os.strerror(error.errno or 0)} on the disk at {here}"


def _existing(place: Path) -> Path:
    place = place.absolute()
    while not place.exists():
        place = place.parent
    return place
