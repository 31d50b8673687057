"""What capture keeps of each layer: two numbers per micro-expert, not the activations."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import TypeVar

import torch

from camera.checkpoints.safetensors_file import read_tensors, write_tensors
from camera.errors import CameraError
from camera.layerwise.sums import ExactSum
from camera.models.block import GATE_UP

Entry = TypeVar("Entry")
Labelled = Mapping[str, Entry]
"""Something for every block of a decoder layer, by its label."""


@dataclass
class BlockStatistics:
    """Statistics of what enters `down_proj`, per FFN channel of one feed-forward network, over all tokens that visit it.

    Activations of an expert are multiplied by the weight that the router gives the token.
    """

    sum_squares_F: torch.Tensor
    """float64 [F], CPU."""
    max_abs_F: torch.Tensor
    """float32 [F], CPU."""
    tokens: int = 0
    """Tokens seen."""

    @classmethod
    def zeros(cls, width: int) -> "BlockStatistics":
        """Of no tokens."""
        return cls(torch.zeros(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float32))

    def check_finite(self, where: str) -> None:
        """Raise CameraError if any activation was NaN or infinite.

        Args:
            where: what they are of, for the message.
        """
        if not torch.isfinite(self.max_abs_F).all():
            raise CameraError(
                f"activations of {where} hold NaN or infinity: capture in float32 or bfloat16 "
                "(capture.dtype) if this was float16; otherwise the checkpoint is damaged"
            )
        if not torch.isfinite(self.sum_squares_F).all():
            raise CameraError(
                f"activations of {where} are as large as {float(self.max_abs_F.max()):.1e}, and their "
                "squares exceed float32: the checkpoint is damaged, or its layers are not normalised"
            )


class StatisticsSum:
    """Adds up the statistics of one feed-forward network on the device that computes it.

    Each sample is summed in float32 (torch sums pairwise), samples are added in order and in float64 (`ExactSum`), so that a
    quarter of a million tokens do not swamp small channels and neither the batch size nor the number of ranks matters.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        """Args:
        width: FFN channels.
        device: of the activations.
        """
        self._squares = ExactSum((width,), device)
        self._max_abs_F = torch.zeros(width, dtype=torch.float32, device=device)
        self._tokens = 0

    def update(
        self, samples: Iterable[torch.Tensor], weights: Iterable[torch.Tensor | None] = repeat(None)
    ) -> None:
        """Add activations.

        Args:
            samples: [tokens, F] of each sample, of any floating dtype: a tensor [batch, tokens, F] will do.
            weights: [tokens] of each sample, what its activations are multiplied by; None is 1.
        """
        reduce = _ReducedInPlace() if self._max_abs_F.device.type == "cpu" else reduced
        # One by one, in order: the same sum whatever the batch size.
        for act_NF, weight_N in zip(samples, weights, strict=False):
            if not len(act_NF):
                continue
            largest_F, squares_F = reduce(act_NF, weight_N)
            torch.maximum(self._max_abs_F, largest_F, out=self._max_abs_F)
            self._squares.add(squares_F)
            self._tokens += len(act_NF)

    def read(self) -> BlockStatistics:
        """The statistics so far, on the CPU."""
        return BlockStatistics(self._squares.read(), self._max_abs_F.to("cpu", copy=True), self._tokens)


def reduced(act_NF: torch.Tensor, weight_N: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest magnitude and the sum of squares of each channel, float32 [F].

    For an accelerator, whose memory is the limit: activations are read twice and written never, unless they are weighted.
    """
    if weight_N is not None:
        act_NF = act_NF.float() * weight_N.float()[:, None]
    norm_F = torch.linalg.vector_norm(act_NF, dim=0, dtype=torch.float32)
    return torch.linalg.vector_norm(act_NF, torch.inf, dim=0).float(), norm_F.square()


class _ReducedInPlace:
    """The same for a CPU: in one buffer, as fresh memory for every sample costs more in page faults than the arithmetic."""

    def __init__(self) -> None:
        self._room = torch.empty(0, 0)

    def __call__(
        self, act_NF: torch.Tensor, weight_N: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if len(self._room) < len(act_NF):
            self._room = torch.empty(act_NF.shape, dtype=torch.float32)
        work_NF = self._room[: len(act_NF)].copy_(act_NF).abs_()
        if weight_N is not None:
            work_NF.mul_(weight_N.float().abs()[:, None])
        return work_NF.amax(dim=0), work_NF.square_().sum(dim=0)


def tensor_name(layer: int, label: str, what: str) -> str:
    """`layers.3.kept`, or of one of several blocks `layers.3.experts.7.kept`."""
    return ".".join(part for part in ("layers", str(layer), label, what) if part)


def labelled(
    tensors: Mapping[str, torch.Tensor], what: str, count: int, where: Path
) -> list[dict[str, torch.Tensor]]:
    """What `tensor_name` named, by layer and block.

    Raises:
        CameraError: if these are not so many layers.
    """
    layers: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if found := re.fullmatch(rf"layers\.(\d+)\.(?:(.+)\.)?{what}", name):
            layers.setdefault(int(found[1]), {})[found[2] or ""] = tensor
    if layers.keys() != set(range(count)):
        raise CameraError(
            f"{where} has {what} of {len(layers)} layers, the model {count}: make it from this model"
        )
    return [layers[layer] for layer in range(count)]


def write_statistics(path: Path, layers: Sequence[Labelled[BlockStatistics]]) -> None:
    """Write all layers to one safetensors file: `layers.N.sum_squares`, `layers.N.max_abs`, `layers.N.tokens`."""
    write_tensors(path, statistics_tensors(layers))


def statistics_tensors(layers: Sequence[Labelled[BlockStatistics]]) -> dict[str, torch.Tensor]:
    """Layers as named tensors, in order."""
    tensors: dict[str, torch.Tensor] = {}
    for layer, blocks in enumerate(layers):
        for label, found in blocks.items():
            tensors[tensor_name(layer, label, "sum_squares")] = found.sum_squares_F
            tensors[tensor_name(layer, label, "max_abs")] = found.max_abs_F
            tensors[tensor_name(layer, label, "tokens")] = torch.tensor(found.tokens)
    return tensors


def statistics_from(
    tensors: Mapping[str, torch.Tensor], count: int, where: Path
) -> list[dict[str, BlockStatistics]]:
    """The inverse of `statistics_tensors`.

    Raises:
        CameraError: if a layer is not there.
    """
    sums, largest, tokens = (
        labelled(tensors, what, count, where) for what in ("sum_squares", "max_abs", "tokens")
    )
    try:
        return [
            {
                label: BlockStatistics(sums[layer][label], largest[layer][label], int(tokens[layer][label]))
                for label in sums[layer]
            }
            for layer in range(count)
        ]
    except KeyError as error:
        raise CameraError(f"{where} lacks statistics of {error}: capture again") from None


def read_statistics(path: Path, count: int) -> list[dict[str, BlockStatistics]]:
    """Read what `write_statistics` wrote, for a model of `count` layers."""
    return statistics_from(read_tensors(path), count, path)


def rows_of(role: str, kept_K: torch.Tensor, width: int) -> torch.Tensor:
    """The rows (of down: columns) of a matrix that belong to channels.

    Args:
        role: of the matrix.
        kept_K: int64 [K], channels.
        width: all channels.

    Returns:
        int64 [K], or [2K] of a matrix that is both gate and up.
    """
    return torch.cat([kept_K, kept_K + width]) if role == GATE_UP else kept_K


def gather_channels(values: torch.Tensor, kept_K: torch.Tensor) -> torch.Tensor:
    """Values [..., F] of the channels int64 [K], contiguous [..., K]; the same bits.

    On the CPU torch gathers integers and float32 three times as fast as it indexes, and half floats as slowly.
    """
    if values.device.type != "cpu":
        return values.index_select(-1, kept_K)
    bits = values.view(torch.int16) if values.itemsize == 2 else values
    return bits.gather(-1, kept_K.expand(*values.shape[:-1], -1)).view(values.dtype)
