"""A table of words, before anyone draws it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Grid:
    """What every output draws in its own way."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int
    """How many of the first columns hold words and are set to the left; the others hold numbers."""
    strong: tuple[int, ...] = ()
    """The rows of the model that the run was for."""
    notes: tuple[str, ...] = ()
