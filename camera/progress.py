"""Progress of long work, reported to its caller."""

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with (units done, units in all) as work goes on. Cheap to call; must not raise."""


def silent(done: int, total: int) -> None:
    """For callers that want no progress."""
