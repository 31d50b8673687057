"""Disks that are full or read-only: the system's errors as messages that say which disk and what to do."""

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
def explain_disk_errors(*places: Path) -> Iterator[None]:
    """Turn the system's error into a DiskError when a disk is full or read-only.

    Args:
        places: where the block writes, for errors that do not say which file they are about.

    Raises:
        DiskError: with the disk, what is free, and what to do.
    """
    try:
        yield
    except OSError as error:
        if (explained := disk_error(error, *places)) is None:
            raise
        raise explained from error


def disk_error(error: OSError, *places: Path) -> DiskError | None:
    """An error as a DiskError if it is a disk's, else None."""
    named = error.filename2 or error.filename  # a copy fails for its target
    if error.errno in FULL:
        if isinstance(named, str | os.PathLike):
            place: Path | None = Path(named)
        else:
            place = min(places, key=lambda place: shutil.disk_usage(_existing(place)).free, default=None)
        state = os.strerror(error.errno) if place is None else f"{place}: {_state(place, error.errno)}"
        return DiskError(
            f"a file could not be written, {state}. Free some space and run the same command again: "
            "what is finished is kept",
            full=True,
        )
    if error.errno in READ_ONLY and error.filename is not None:
        return DiskError(
            f"{error.filename} cannot be written ({os.strerror(error.errno)}): mount its disk for writing, correct "
            "the rights, or choose another place (CAMERA_HOME for the store)",
            full=False,
        )
    return None


def _state(place: Path, number: int) -> str:
    mount = _existing(place)
    while not mount.is_mount() and mount != mount.parent:
        mount = mount.parent
    if number != errno.ENOSPC:
        return f"{os.strerror(number)} on the disk at {mount}"
    usage = shutil.disk_usage(mount)
    return f"the disk at {mount} is full ({bytes_text(usage.free)} of {bytes_text(usage.total)} free)"


def _existing(place: Path) -> Path:
    place = place.absolute()
    while not place.exists():
        place = place.parent
    return place
