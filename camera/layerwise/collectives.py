"""Collectives of several ranks: processes that run one model together, each over its share of the samples.

Only statistics cross between processes: a few hundred kilobytes per layer, as CPU tensors over gloo on loopback,
whatever device the layers compute on. So nccl and hccl are not needed, and float64 sums are at home.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from camera.errors import CameraError
from camera.held import expected_now, expecting
from camera.layerwise.statistics import BlockStatistics

_START_TIMEOUT = timedelta(minutes=5)
_COLLECTIVE_TIMEOUT = timedelta(
    hours=12
)  # a rank may wait for a slower one through a whole layer of a large model


class Collectives:
    """This process among those that share the work; alone by default.

    The group is an object of ours, not torch's global one: a group that failed to form leaves nothing behind that
    the next one would wait for, and a program that has a global group of its own keeps it.
    """

    def __init__(self, rank: int = 0, count: int = 1, group: Any = None) -> None:
        self.rank = rank
        self.count = count
        self._group = group  # a ProcessGroupGloo; the stubs of torch leave its collectives out

    @property
    def first(self) -> bool:
        """Whether this process writes the results."""
        return self.rank == 0

    def share(self, samples_ST: torch.Tensor) -> torch.Tensor:
        """This rank's samples: consecutive, as even as can be; the first ranks have one more."""
        return samples_ST.tensor_split(self.count)[self.rank]

    def merge(self, statistics: BlockStatistics) -> None:
        """Make `statistics` those of all ranks together: sums add, maxima are maxima."""
        if self._group is not None:
            self._group.allreduce(statistics.sum_squares_F, dist.ReduceOp.SUM).wait()
            self._group.allreduce(statistics.max_abs_F, dist.ReduceOp.MAX).wait()
            tokens = torch.tensor([statistics.tokens])
            self._group.allreduce(tokens, dist.ReduceOp.SUM).wait()
            statistics.tokens = int(tokens)

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Make a tensor, on any device, the sum of all ranks' tensors."""
        if self._group is not None:
            shared = tensor.cpu()
            self._group.allreduce(shared, dist.ReduceOp.SUM).wait()
            tensor.copy_(shared)

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Make a contiguous CPU tensor that of the first rank, bit for bit."""
        if self._group is not None:
            self._group.broadcast(tensor.view(-1).view(torch.uint8), 0).wait()

    def broadcast_int(self, value: int) -> int:
        """The value of the first rank, on every rank."""
        if self._group is None:
            return value
        shared = torch.tensor([value])
        self._group.broadcast(shared, 0).wait()
        return int(shared)

    def all_equal(self, value: int) -> bool:
        """Whether every rank has the same value."""
        if self._group is None:
            return True
        bounds = torch.tensor([value, -value])
        self._group.allreduce(bounds, dist.ReduceOp.MAX).wait()
        return int(bounds[0]) == -int(bounds[1])

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self._group is not None:
            self._group.barrier().wait()

    def leave(self) -> None:
        """Close the connections to the others."""
        self._group = None


@contextmanager
def ranks(count: int, work: Callable[..., None], *arguments: Any) -> Iterator[Collectives]:
    """Start `count` − 1 more processes that call `work(ranks, *arguments)`; this one is the first rank.

    Threads of the CPU are divided among the ranks.

    Raises:
        CameraError: if another rank failed, with what it said.
    """
    if count == 1:
        yield Collectives()
        return
    threads = torch.get_num_threads()
    share = max(1, threads // count)
    group = Collectives()
    with tempfile.TemporaryDirectory(prefix="camera-ranks-") as meeting:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["camera.layerwise.collectives"])
        others: list[BaseProcess] = [
            context.Process(
                target=_run_rank,
                args=(_Place(rank, count, share, meeting), dict(os.environ), expected_now(), work, arguments),
                daemon=True,
            )
            for rank in range(1, count)
        ]
        for process in others:
            process.start()
        try:
            torch.set_num_threads(share)
            _wait_for_start(others, Path(meeting))
            group = _join(0, count, meeting)
            yield group
            for process in others:
                process.join()
            if any(process.exitcode for process in others) and not _error_of_a_rank(Path(meeting)):
                raise RuntimeError("one of them ended too early")
        except RuntimeError as error:  # a peer is gone: say why it went, not that its socket closed
            raise CameraError(_error_of_a_rank(Path(meeting)) or f"a rank was lost: {error}") from error
        finally:
            torch.set_num_threads(threads)
            group.leave()
            for process in others:
                process.terminate()
                process.join()
        if message := _error_of_a_rank(Path(meeting)):
            raise CameraError(message)


def _wait_for_start(others: list[BaseProcess], meeting: Path) -> None:
    """Wait until all have started; joining a group whose member died at start would wait for ever."""
    while sum(1 for _ in meeting.glob("ready-*")) < len(others):
        for process in others:
            if process.exitcode is not None:
                raise CameraError(
                    _error_of_a_rank(meeting) or f"a rank ended at its start (exit code {process.exitcode})"
                )
        time.sleep(0.05)


@dataclass(frozen=True)
class _Place:
    """Of a rank among the others."""

    rank: int
    count: int
    threads: int
    meeting: str
    """The folder in which they find each other."""


def _run_rank(
    place: _Place,
    environment: dict[str, str],
    held: list[Any],
    work: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.update(environment)  # that of the server may be older
    torch.set_num_threads(place.threads)
    meeting = Path(place.meeting)
    try:
        (meeting / f"ready-{place.rank}").touch()
        with expecting(held):
            work(_join(place.rank, place.count, place.meeting), *arguments)
    except CameraError as error:
        (meeting / f"error-{place.rank}").write_text(str(error), encoding="utf-8")


def _join(rank: int, count: int, meeting: str) -> Collectives:
    # One machine: never listen to the network.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    store = dist.FileStore(str(Path(meeting) / "store"), count)  # type: ignore[attr-defined, unused-ignore]
    store.set_timeout(_START_TIMEOUT)
    group = dist.ProcessGroupGloo(store, rank, count, _START_TIMEOUT)
    group.set_timeout(_COLLECTIVE_TIMEOUT)
    return Collectives(rank, count, group)


def _error_of_a_rank(meeting: Path) -> str | None:
    messages = sorted(path.read_text(encoding="utf-8") for path in meeting.glob("error-*"))
    return messages[0] if messages else None
