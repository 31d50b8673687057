"""Being told to stop, so that it is not forgotten.

Python raises KeyboardInterrupt wherever it happens to be. In a destructor, a callback of another library or an import
that is tried and given up, that exception is dropped, and a run would go on to its end as if nothing had been said.
"""

import signal
from types import FrameType

_told = False


def listen() -> None:
    """Take Ctrl-C and a polite kill alike: the stage stops where it is and resumes there."""
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)


def stop_if_told() -> None:
    """Raise KeyboardInterrupt if one was raised before and dropped; call it before each step."""
    if _told:
        raise KeyboardInterrupt


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _told
    _told = True
    raise KeyboardInterrupt
