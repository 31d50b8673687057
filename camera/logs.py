"""What logs, warnings and tracebacks of any library say: without control characters, lines of ours, or secrets."""

import logging
import sys
import traceback
import warnings
from types import TracebackType
from typing import Any

from camera.escape import lines, lines_of_one
from camera.secrets import without_secrets

_formatted_warning = warnings.formatwarning


class _HarmlessRecord(logging.LogRecord):
    """A record whose text is shown by any handler and any formatter as `note` would show it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.exc_info and self.exc_info[0] is not None:
            self.exc_text = _shown("".join(traceback.format_exception(*self.exc_info))).rstrip()

    def getMessage(self) -> str:  # the library's name
        return lines_of_one(without_secrets(super().getMessage()))


def harmless_logs() -> None:
    """From now on in this process, no log, warning or traceback holds control characters or secrets."""
    logging.setLogRecordFactory(_HarmlessRecord)
    warnings.formatwarning = _warning
    sys.excepthook = _traceback


def _warning(*args: Any, **kwargs: Any) -> str:
    return _shown(_formatted_warning(*args, **kwargs))


def _traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if sys.stderr is not None:
        sys.stderr.write(_shown("".join(traceback.format_exception(kind, error, trace))))


def _shown(text: str) -> str:
    return lines(without_secrets(text))
