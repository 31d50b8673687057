"""Errors that the user can resolve: one message, which says what to do next."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager


class CameraError(Exception):
    """An error of input or environment. The message names the field, file or layer, and says what to do next.

    The command line prints it alone (no traceback) and exits with code 2.
    """


MISREAD = (
    *(KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError, AssertionError),
    *(RecursionError, StopIteration, struct.error),
)
"""What Python raises where a file of somebody else's holds something that nobody thought of."""


@contextmanager
def understood(what: str, remedy: str = "fetch it again from where it is from") -> Iterator[None]:
    """While the block makes sense of a file that may hold anything: what it stumbles over is an error of the file.

    The second line of defence; a check that names the key says more.

    Args:
        what: is read, for the message: `model/tokenizer.json`.
        remedy: what to do.

    Raises:
        CameraError: for any of `MISREAD`.
    """
    try:
        yield
    except MISREAD as error:
        raise CameraError(f"{what} cannot be understood ({error!r:.200}): {remedy}") from error


class NetworkError(CameraError):
    """A hub or remote did not answer. The only kind of failure that is worth trying again unchanged."""
