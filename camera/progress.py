"""How long work tells whoever waits for it how far it has come."""

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with (units done, units in all) as work goes on. Cheap to call; must not raise."""


def silent(done: int, total: int) -> None:
    """The progress listener of callers who do not wait."""
