"""Work done in a thread behind the one that goes on, in the order in which it was given."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

_MOST_WAITING = 2


class Behind:
    """A thread that works off what it is given. What fails stops all that comes after, and is raised in the caller."""

    def __init__(self, start: Callable[[], None] = lambda: None) -> None:
        """Args:
        start: called in the thread, first.
        """
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="behind", initializer=start)
        self._waiting: deque[Future[None]] = deque()
        self._error: BaseException | None = None

    def submit(self, work: Callable[..., None], *arguments: Any) -> None:
        """Add work; waits while two pieces are waiting.

        Raises:
            Exception: what earlier work raised.
        """
        while self._waiting and (len(self._waiting) >= _MOST_WAITING or self._waiting[0].done()):
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(self._run, work, *arguments))

    def do(self, work: Callable[..., None], *arguments: Any) -> None:
        """Do work after all that was added before, and wait for it; may be called from another thread.

        Raises:
            Exception: what it, or earlier work, raised.
        """
        self._thread.submit(self._run, work, *arguments).result()

    def close(self) -> None:
        """Wait for what has begun, and forget what has not."""
        self._thread.shutdown(cancel_futures=True)

    def _run(self, work: Callable[..., None], *arguments: Any) -> None:
        if self._error is not None:
            raise self._error
        try:
            work(*arguments)
        except BaseException as error:
            self._error = error
            raise
