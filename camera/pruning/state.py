"""What a killed walk left: statistics of the layers it finished, and the hidden states that enter the next one.

One file per rank and layer, written whole; all ranks' files of the same layer make one state. A state belongs to
the inputs whose fingerprint it holds and is ignored for any other.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from camera.checkpoints.safetensors_file import read_tensors, write_tensors
from camera.errors import CameraError
from camera.files import whole_file
from camera.pruning.statistics import LayerStatistics, statistics_from, statistics_tensors

_FINGERPRINT = "fingerprint"
_HIDDEN = "hidden"


@dataclass(frozen=True)
class WalkState:
    """A walk after its first `len(layers)` layers."""

    layers: list[LayerStatistics]
    hidden_STH: torch.Tensor
    """Hidden states of this rank's samples, as the next layer will read them; mapped, they may exceed memory."""


class StateFiles:
    """The state files of one rank in one working folder."""

    def __init__(self, folder: Path, fingerprint: str, rank: int = 0, ranks: int = 1) -> None:
        self._folder = folder
        self._fingerprint = fingerprint
        self._rank = rank
        self._ranks = ranks

    def save(self, layers: list[LayerStatistics], hidden_STH: torch.Tensor) -> None:
        """Save the state after `len(layers)` layers, durably."""
        self.write(layers, hidden_STH).close()

    def write(self, layers: list[LayerStatistics], hidden_STH: torch.Tensor) -> ExitStack:
        """Write the state after `len(layers)` layers; it counts once the stack that is returned has been left.

        Leaving it waits for the disk; leaving it by an exception removes what was written.
        """
        tensors = statistics_tensors(layers)
        tensors[_HIDDEN] = hidden_STH
        tensors[_FINGERPRINT] = torch.tensor(list(bytes.fromhex(self._fingerprint)), dtype=torch.uint8)
        with ExitStack() as unfinished:
            write_tensors(unfinished.enter_context(whole_file(self._path(len(layers), self._rank))), tensors)
            return unfinished.pop_all()

    def drop_before(self, count: int) -> None:
        """Remove this rank's states of fewer than `count` layers; call once all ranks have saved theirs."""
        for path in self._folder.glob(f"resume-*-{self._rank}of{self._ranks}.safetensors"):
            if _layers_of(path) < count:
                path.unlink(missing_ok=True)

    def newest(self) -> WalkState | None:
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

    def _read(self, count: int) -> WalkState | None:
        path = self._path(count, self._rank)
        try:
            tensors = read_tensors(path)
            if bytes(tensors[_FINGERPRINT].tolist()).hex() != self._fingerprint:
                return None
            hidden_STH = tensors.pop(_HIDDEN)
            copies = {
                name: tensor.clone() for name, tensor in tensors.items()
            }  # nothing long-lived on the map
            return WalkState(statistics_from(copies, count, path), hidden_STH)
        except (CameraError, KeyError):
            return None


def clear_states(folder: Path) -> None:
    """Remove every state, also those of other inputs or another number of ranks."""
    for path in folder.glob("resume-*.safetensors"):
        path.unlink(missing_ok=True)


def _layers_of(path: Path) -> int:
    digits = path.name.split("-")[1]
    return int(digits) if digits.isdigit() else -1
