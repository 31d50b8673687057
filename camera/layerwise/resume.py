"""Resume state: what is known of the layers that a killed run finished, and the hidden states that enter the next one.

One file per rank and layer, written atomically; all ranks' files of the same layer make one state. A state belongs to
the inputs whose fingerprint it holds and is ignored for any other, and so is one whose bytes do not have its digest.
"""

import hashlib
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch

from camera.checkpoints.safetensors_file import read_tensors, write_tensors
from camera.errors import CameraError
from camera.files import atomic_file
from camera.layerwise.collectives import Collectives

_BYTES_PER_SECOND = 1e9
"""What writing the first state is taken to cost, until it has been measured."""
_FINGERPRINT = "fingerprint"
_HIDDEN = "hidden"
_DIGEST = "digest"
_CHUNK_BYTES = 8 << 20


class SaveRule(NamedTuple):
    """When a state is worth its price."""

    seconds: float
    """What a kill may lose without one."""
    share: float
    """Of a run's time that saving may take."""


RULE = SaveRule(60.0, 0.02)


@dataclass(frozen=True)
class ResumeState:
    """A run after its first `count` layers."""

    count: int
    tensors: dict[str, torch.Tensor]
    """What is known of those layers, by the names that the caller gave."""
    hidden_STH: torch.Tensor
    """Hidden states of this rank's samples, as the next layer will read them; mapped, they may exceed memory."""


class StateFiles:
    """The state files of one rank in one working folder."""

    def __init__(self, folder: Path, fingerprint: str, rank: int = 0, ranks: int = 1) -> None:
        self._folder = folder
        self._fingerprint = fingerprint
        self._rank = rank
        self._ranks = ranks

    def save(self, count: int, tensors: dict[str, torch.Tensor], hidden_STH: torch.Tensor) -> None:
        """Save the state after `count` layers, durably."""
        self.write(count, tensors, hidden_STH).close()

    def write(self, count: int, tensors: dict[str, torch.Tensor], hidden_STH: torch.Tensor) -> ExitStack:
        """Write the state after `count` layers; it counts once the stack that is returned has been left.

        Leaving it waits for the disk; leaving it by an exception removes what was written.
        """
        tensors = dict(tensors)
        tensors[_HIDDEN] = hidden_STH
        tensors[_FINGERPRINT] = torch.tensor(list(bytes.fromhex(self._fingerprint)), dtype=torch.uint8)
        tensors[_DIGEST] = _digest(tensors)
        with ExitStack() as unfinished:
            write_tensors(unfinished.enter_context(atomic_file(self._path(count, self._rank))), tensors)
            return unfinished.pop_all()

    def drop_before(self, count: int) -> None:
        """Remove this rank's states of fewer than `count` layers; call once all ranks have saved theirs."""
        for path in self._folder.glob(f"resume-*-{self._rank}of{self._ranks}.safetensors"):
            if _layers_of(path) < count:
                path.unlink(missing_ok=True)

    def newest(self) -> ResumeState | None:
        """The state of the most layers that every rank has, if there is one of these inputs and it is whole."""
        counts = sorted(
            map(_layers_of, self._folder.glob(f"resume-*-{self._rank}of{self._ranks}.safetensors"))
        )
        for count in reversed(counts):
            if not all(self._path(count, rank).is_file() for rank in range(self._ranks)):
                continue
            if (state := self._read(count)) is not None:
                return state
        return None

    def _path(self, count: int, rank: int) -> Path:
        return self._folder / f"resume-{count:04d}-{rank}of{self._ranks}.safetensors"

    def _read(self, count: int) -> ResumeState | None:
        path = self._path(count, self._rank)
        try:
            tensors = read_tensors(path)
            if bytes(tensors[_FINGERPRINT].tolist()).hex() != self._fingerprint:
                return None
            if not torch.equal(tensors.pop(_DIGEST), _digest(tensors)):
                return None
            hidden_STH = tensors.pop(_HIDDEN)
            # Copies, so that nothing long-lived is backed by the map.
            copies = {name: tensor.clone() for name, tensor in tensors.items()}
            copies.pop(_FINGERPRINT)
            return ResumeState(count, copies, hidden_STH)
        except (CameraError, KeyError):
            return None


def _digest(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """sha256 of tensors, names included: uint8 [32]."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        for chunk in tensor.contiguous().reshape(-1).view(torch.uint8).split(_CHUNK_BYTES):
            digest.update(chunk.numpy().data)
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


def clear_states(folder: Path) -> None:
    """Remove every state, also those of other inputs or another number of ranks."""
    for path in folder.glob("resume-*.safetensors"):
        path.unlink(missing_ok=True)


def _layers_of(path: Path) -> int:
    digits = path.name.split("-")[1]
    return int(digits) if digits.isdigit() else -1


class StateSaver:
    """Saves one run's state where a kill in the next layer would lose more than a minute, for at most 2 % of its time.

    A run of a minute so saves none. Where two per cent are not enough for a state a minute, a kill loses more; and never less
    than the layer that it comes in.

    A state is written before the run goes on, which changes the hidden states in place; a thread then waits until
    the disk has it, while the next layer computes. Several ranks, which must agree on what counts, wait themselves.
    """

    def __init__(self, states: StateFiles, ranks: Collectives, before: Callable[[], None]) -> None:
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
        self._since = self._layer = time.monotonic()
        self._cost: float | None = None

    def __enter__(self) -> "StateSaver":
        return self

    def save_if_due(
        self, count: int, tensors: Callable[[], dict[str, torch.Tensor]], hidden_STH: torch.Tensor
    ) -> None:
        """Save the state after `count` layers if it is time to.

        Args:
            count: layers that are finished.
            tensors: gives what is known of them.
            hidden_STH: hidden states that enter the next layer.

        Raises:
            DiskError: if this state or the last one could not be written.
        """
        begun = time.monotonic()
        since, next_layer = begun - self._since, begun - self._layer  # as long as the last
        self._layer = begun
        cost = hidden_STH.nbytes / _BYTES_PER_SECOND if self._cost is None else self._cost
        due = since + next_layer > RULE.seconds and cost <= RULE.share * since
        if not self._ranks.broadcast_int(due):
            return
        self._wait()
        written = self._states.write(count, tensors(), hidden_STH)
        if self._ranks.count == 1:
            self._last = self._disk.submit(self._make_count, written, count)
        else:
            self._make_count(written, count)
        self._since = self._layer = time.monotonic()
        self._cost = self._since - begun

    def _make_count(self, written: ExitStack, count: int) -> None:
        with written:
            self._before()
        self._ranks.barrier()
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
