"""Saves a walk's state as it goes: as often as costs little, and without waiting for the disk."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType

import torch

from camera.pruning.ranks import Ranks
from camera.pruning.state import StateFiles
from camera.pruning.statistics import LayerStatistics

_SHARE = 0.015
_PATIENCE = 3
"""How many times its share a state may take that would keep a kill from losing more than two layers."""


class Saving:
    """The saving of one walk, for 1.5 % of its time, and 4.5 % where a kill would else lose more than two layers.

    A state is written before the walk goes on, which changes the hidden states in place; a thread then waits until
    the disk has it, while the next layer computes. Several ranks, which must agree on what counts, wait themselves.
    """

    def __init__(self, states: StateFiles, ranks: Ranks, before: Callable[[], None]) -> None:
        """
        Args:
            states: where.
            ranks: the processes that share the samples.
            before: makes durable what was done with the layers of a state, before the state counts.
        """
        self._states = states
        self._ranks = ranks
        self._before = before
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._last: Future[None] | None = None
        self._since = time.monotonic()
        self._cost = 0.0
        self._saved = 0

    def __enter__(self) -> "Saving":
        return self

    def save_if_due(self, layers: list[LayerStatistics], hidden_STH: torch.Tensor) -> None:
        """Save the state after `len(layers)` layers if it is time to.

        Raises:
            DiskError: if this state or the last one could not be written.
        """
        begun = time.monotonic()
        share = _SHARE if len(layers) < self._saved + 2 else _PATIENCE * _SHARE
        if not self._ranks.agree((begun - self._since) * share >= self._cost):
            return
        self._wait()
        written = self._states.write(layers, hidden_STH)
        if self._ranks.count == 1:
            self._last = self._disk.submit(self._make_count, written, len(layers))
        else:
            self._make_count(written, len(layers))
        self._saved = len(layers)
        self._since = time.monotonic()
        self._cost = self._since - begun

    def _make_count(self, written: ExitStack, count: int) -> None:
        with written:
            self._before()
        self._ranks.wait()
        self._states.drop_before(count)

    def _wait(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._disk.shutdown()
        if kind is None:
            self._wait()
