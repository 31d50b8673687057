"""The former names of `camera.files`, until every caller has moved."""

from pathlib import Path

from camera.files import remove_stale_temporaries
from camera.files import temporary_sibling as temporary_of

__all__ = ["sweep", "temporary_of"]


def sweep(folder: Path, *, alone: bool = False) -> None:
    """See `remove_stale_temporaries`."""
    remove_stale_temporaries(folder, exclusive=alone)
