"""The standard streams of a command: closed, with a reader that went away, or in an encoding that knows few signs.

What is only shown makes no failure of work that is done. So a stream that was closed leads nowhere, one whose reader ends
(`| head -1`) leads nowhere from then on, and signs that its encoding lacks are spelt in others.
"""

import codecs
import errno
import io
import os
import stat
import sys
from typing import Any

_NAMES = {0: "stdin", 1: "stdout", 2: "stderr"}
_SPELT = {
    "✓": "[ok]", "✗": "[WRONG]", "–": "-", "—": "-", "…": "...", "×": "x", "±": "+-", "−": "-", "→": "->", "·": "-",
    "●": "*", "↑": "^", "÷": "/", "│": "|", "├": "|", "└": "`", "─": "-", "━": "-", "╺": "-", "╸": "-", "╭": "+", "╮": "+",
    "╰": "+", "╯": "+",
}  # fmt: skip
"""Our own signs for an encoding that lacks them. Not `?`, which is a verdict of the audit."""
_GONE = (errno.EPIPE, errno.EBADF, errno.EIO, errno.ECONNRESET)
"""What a write fails with where nobody reads any more: a pipe, a closed file, a terminal that hung up."""


def lasting() -> None:
    """Make the standard streams of this process such that writing to them cannot fail for what is at their other end."""
    codecs.register_error("camera.spelt", _spelt)
    for number, name in _NAMES.items():
        _occupy(number)
        stream = getattr(sys, name)
        if stream is None:  # closed when Python started
            setattr(sys, name, open(os.devnull, "r" if number == 0 else "w", encoding="utf-8"))  # noqa: SIM115
        elif number and _is_own(stream, number):
            setattr(sys, name, _Lasting.of(stream, number))


class _Lasting(io.FileIO):
    """A descriptor that leads nowhere once its reader is gone."""

    def write(self, content: Any) -> int:
        try:
            return super().write(content) or 0
        except OSError as error:
            if error.errno == errno.EIO and not self._is_device():
                raise OSError(error.errno, error.strerror, _NAMES[self.fileno()]) from None
            if error.errno not in _GONE:
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(content)

    def _is_device(self) -> bool:
        """As a terminal is, and no file on a disk that fails. (`isatty` is false for one that hung up.)"""
        return stat.S_ISCHR(os.fstat(self.fileno()).st_mode)

    @classmethod
    def of(cls, stream: io.TextIOWrapper, number: int) -> io.TextIOWrapper:
        """The same stream over such a descriptor."""
        stream.flush()
        return io.TextIOWrapper(
            io.BufferedWriter(cls(number, "wb", closefd=False)),
            encoding=stream.encoding,
            errors="camera.spelt",
            line_buffering=stream.line_buffering or number == 2,
            write_through=stream.write_through,
        )


def _is_own(stream: object, number: int) -> bool:
    """Whether a stream is Python's own for a descriptor, and not what a test or a caller put in its place."""
    if not isinstance(stream, io.TextIOWrapper):
        return False
    raw = getattr(stream.buffer, "raw", stream.buffer)  # the same one under PYTHONUNBUFFERED
    return type(raw) is io.FileIO and raw.fileno() == number


def _occupy(number: int) -> None:
    """Let a closed descriptor lead nowhere: the next file that is opened would get its number, and our output with it."""
    try:
        os.fstat(number)
    except OSError:
        nowhere = os.open(os.devnull, os.O_RDWR)
        if nowhere != number:
            os.dup2(nowhere, number)
            os.close(nowhere)


def _spelt(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    signs = error.object[error.start : error.end]
    return "".join(_SPELT.get(sign) or _code(sign) for sign in signs), error.end


def _code(sign: str) -> str:
    return sign.encode("ascii", "backslashreplace").decode()
