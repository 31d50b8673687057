"""CAMERA-Q simulated: the channels of experts in groups of importance, one precision for a channel's three vectors.

Source: the idea of CAMERA-Q (docs/quantization.md says what is known of it; its code was never published). A micro-expert
is a row of gate, a row of up and a column of down. Its importance decides how many bits all three get. No file format has
such rows, so the result is an ordinary checkpoint with the numbers that they would stand for: it measures what the scheme
would cost, and saves nothing.

A number is (n + ½)·step with n one of 2^bits whole numbers around 0, and a step of 16 bits for each group of columns in a row.
The columns of down are put in the order of importance, which leaves the network the same, so that the columns of a group
have one precision. Rounding compensates as GPTQ does.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import SafetensorsWriter
from camera.checkpoints.weights import INDEX_NAME
from camera.devices import resolve_device, resolve_dtype
from camera.errors import CameraError
from camera.files import atomic_folder, copy_file, write_json
from camera.layerwise.experts import Matrices, activations
from camera.layerwise.experts_pass import ExpertsPass
from camera.layerwise.observers import sum_of_products
from camera.layerwise.runner import LayerRunner
from camera.models import Block
from camera.models.block import FEED_FORWARD
from camera.options import QuantizeOptions
from camera.progress import Progress, silent
from camera.pruning.importance import block_importance
from camera.quantization.compensation import Block as Columns
from camera.quantization.compensation import compensate
from camera.quantization.factor import Factor, factor_moments
from camera.quantization.hidden_states import HiddenStates

SUMMARY_NAME = "camera_q.json"
GROUP_LENGTH = 64
"""Columns of a row that share a step."""
_STEP_BITS = 16
_SUITED_STEP = {1: 1.596, 2: 0.9957, 3: 0.5860, 4: 0.3352}
"""Of normally distributed numbers of unit variance, the step with the least error (Max 1960, table II)."""
_FACTORS = (1.0, 0.8, 0.9, 1.1, 1.2, 0.7, 1.35)
"""Steps to try, of the suited one."""
_LEAST_STEP = 6e-8
_LEAST_TOKENS = 16


class Group(NamedTuple):
    """A part of the channels."""

    bits: int
    """1 to 4."""
    share: float
    """Of all channels; the most important come first."""


class CameraQ(NamedTuple):
    """What gets how many bits."""

    groups: tuple[Group, ...] = (Group(3, 0.25), Group(2, 0.5), Group(1, 0.25))
    """From the most important channels to the least."""
    scope: Literal["expert", "layer"] = "layer"
    """Whether the channels of an expert or of a whole layer are ranked together."""
    reduce_ratio: float = 0.95
    """α of the importance."""
    compensates: bool = True
    """Whether later columns make good the errors of earlier ones."""


def simulate_camera_q(
    checkpoint: Checkpoint,
    out: Path,
    tokens_ST: torch.Tensor,
    scheme: CameraQ,
    options: QuantizeOptions,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write a checkpoint whose experts have the numbers that so few bits would leave; all else is as it was.

    Layers are rounded in order, each for what the rounded ones before it put out. The network that experts share is rounded
    like them; dense layers, attention, routers, embedding and head are not.

    Args:
        checkpoint: a mixture of experts.
        out: the folder to make.
        tokens_ST: int64 [samples, tokens].
        scheme: what gets how many bits.
        options: batch size, dtype, device and damping.
        progress: told (decoder layers done, all).

    Returns:
        what is written to `camera_q.json`: the groups with the channels in them, `bits_per_weight` of the rounded matrices
        with their steps, `weights` (how many), and `scope`.

    Raises:
        CameraError: for a model without experts, groups that cannot be, or activations with NaN or infinity.
    """
    if checkpoint.experts is None:
        raise CameraError(f"{checkpoint.folder} has no experts: CAMERA-Q is for mixtures of experts")
    if abs(sum(group.share for group in scheme.groups) - 1) > 1e-6 or any(
        group.bits not in _SUITED_STEP or group.share < 0 for group in scheme.groups
    ):
        raise CameraError("CAMERA-Q: shares add up to 1, and bits are 1 to 4")
    simulation = _Simulation(checkpoint, scheme, options)
    with atomic_folder(out) as folder:
        with torch.inference_mode(), _writers(checkpoint, folder) as writers:
            for layer, matrices in simulation.layers(tokens_ST):
                for name, matrix in matrices.items():
                    info = checkpoint.tensors[name]
                    writers[info.file].write(name, matrix.to(info.dtype))
                progress(layer + 1, checkpoint.layer_count)
        summary = simulation.summary()
        write_json(folder / SUMMARY_NAME, summary)
    return summary


class _Simulation:
    """The layers of one model, and the bits that were counted."""

    def __init__(self, checkpoint: Checkpoint, scheme: CameraQ, options: QuantizeOptions) -> None:
        self._checkpoint = checkpoint
        self._scheme = scheme
        self._options = options
        self._bits = self._weights = 0
        self._channels = [0] * len(scheme.groups)

    def layers(self, tokens_ST: torch.Tensor) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        """The rounded matrices of each layer, by name; none of a dense one."""
        checkpoint, options = self._checkpoint, self._options
        dtype = resolve_dtype(options.dtype, checkpoint.dtype)
        runner = LayerRunner(checkpoint, resolve_device(options.device), dtype)
        states = HiddenStates(runner, runner.embed(tokens_ST), options.batch_size)
        for layer in range(checkpoint.layer_count):
            rounded: dict[str, torch.Tensor] = {}
            with runner.layer(layer) as module:
                if checkpoint.is_sparse(layer):
                    run = states.experts(layer, module)
                    groups = self._groups(run)
                    for block in run.blocks:
                        rounded |= self._round(run, block, groups[block.label])
                    run.finish()
                else:
                    states.advance(module)
            yield layer, rounded

    def summary(self) -> dict[str, Any]:
        return {
            "groups": [
                {"bits": group.bits, "share": group.share, "channels": channels}
                for group, channels in zip(self._scheme.groups, self._channels, strict=True)
            ],
            "scope": self._scheme.scope,
            "group_length": GROUP_LENGTH,
            "weights": self._weights,
            "bits_per_weight": self._bits / self._weights if self._weights else 0.0,
        }

    def _groups(self, run: ExpertsPass) -> dict[str, torch.Tensor]:
        """Which group each channel of each block is in."""
        scores = {}
        for block in run.blocks:
            statistics = run.observe(block)
            statistics.check_finite(f"{block.prefix}{block.label}")
            scores[block.label] = block_importance(
                self._checkpoint, block, statistics, self._scheme.reduce_ratio
            )
        if self._scheme.scope == "expert":
            found = {
                label: groups_by_rank(scores_F, self._scheme.groups) for label, scores_F in scores.items()
            }
        else:
            ranked = groups_by_rank(torch.cat(list(scores.values())), self._scheme.groups)
            parts = ranked.split([len(scores_F) for scores_F in scores.values()])
            found = dict(zip(scores, parts, strict=True))
        for groups_F in found.values():
            for number in range(len(self._channels)):
                self._channels[number] += int((groups_F == number).sum())
        return found

    def _round(self, run: ExpertsPass, block: Block, groups_F: torch.Tensor) -> dict[str, torch.Tensor]:
        """A block's matrices, rounded for the tokens that visit it, and put out."""
        gate_FH, up_FH, down_HF = (self._checkpoint.read_finite(name).float() for name in block.names)
        bits_F = torch.tensor([group.bits for group in self._scheme.groups])[groups_F]
        enough = block.expert is None or sum(map(len, run.inputs(block))) >= _LEAST_TOKENS
        enough = enough and self._scheme.compensates
        hidden = down_HF.shape[0]
        factor_H = Factor.identity(hidden)
        if enough:
            factor_H = self._factor(sum_of_products(run.inputs(block), hidden, run.device), block.gate)
        both = torch.cat([gate_FH, up_FH])
        for bits in bits_F.unique().tolist():
            rows = torch.cat([bits_F, bits_F]) == bits
            both[rows] = self._rounded(both[rows], factor_H, torch.full((both.shape[1],), bits))
        gate_FH, up_FH = both.split(len(gate_FH))
        order_F = torch.argsort(groups_F, stable=True)
        factor_F = Factor.identity(len(order_F))
        if enough:
            inner = Matrices(*(each.to(run.device, run.dtype) for each in (gate_FH, up_FH, down_HF)))
            acts = (activations(hidden_NH, inner, run.act)[:, order_F] for hidden_NH in run.inputs(block))
            factor_F = self._factor(sum_of_products(acts, len(order_F), run.device), block.down)
        down_HF[:, order_F] = self._rounded(down_HF[:, order_F], factor_F, bits_F[order_F])
        by_role = dict(zip(FEED_FORWARD, (gate_FH, up_FH, down_HF), strict=True))
        stored = {role: matrix.to(run.device, run.dtype) for role, matrix in by_role.items()}
        run.put_out(block, torch.arange(len(gate_FH)), stored)
        return {block.by_role[role]: matrix for role, matrix in by_role.items()}

    def _factor(self, moments_II: torch.Tensor, name: str) -> Factor:
        return factor_moments(moments_II.cpu(), self._options.damping, name=name)

    def _rounded(self, weight: torch.Tensor, factor: Factor, bits: torch.Tensor) -> torch.Tensor:
        """`round_columns`, its bits counted."""
        rows = len(weight)
        self._weights += weight.numel()
        self._bits += rows * (int(bits.sum()) + _STEP_BITS * len(list(_runs(bits))))
        return round_columns(weight, factor, bits)


def groups_by_rank(scores_F: torch.Tensor, groups: tuple[Group, ...]) -> torch.Tensor:
    """The number of the group that each channel is in, int64 [F]; of equal scores the earlier counts as the higher."""
    ranked_F = torch.argsort(scores_F, descending=True, stable=True)
    found_F = torch.empty(len(scores_F), dtype=torch.int64)
    start, share = 0, 0.0
    for number, group in enumerate(groups):
        share += group.share
        stop = round(share * len(scores_F))
        found_F[ranked_F[start:stop]] = number
        start = stop
    return found_F


def round_columns(weight: torch.Tensor, factor: Factor, bits: torch.Tensor) -> torch.Tensor:
    """Round a matrix, columns of so many bits each, so that later columns compensate the errors of earlier ones.

    Args:
        weight: float32 [R, C].
        factor: of the second moments of the C inputs; the identity compensates nothing.
        bits: int64 [C], 1 to 4; columns share a step as far as neighbours have equally many.

    Returns:
        float32 [R, C], the numbers that are stored.
    """
    out = torch.empty_like(weight)

    def round_group(group: Columns) -> torch.Tensor:
        numbers_LR = _round_group(group, int(bits[group.columns.start]))
        out[:, group.columns] = numbers_LR.T
        return numbers_LR

    compensate(weight, factor, list(_runs(bits)), round_group)
    return out


def _runs(bits: torch.Tensor) -> Iterator[slice]:
    """Columns that share a step: neighbours with equally many bits, `GROUP_LENGTH` at most."""
    start = 0
    while start < len(bits):
        window = bits[start : start + GROUP_LENGTH]
        different = (window != window[0]).nonzero()
        stop = start + (int(different[0]) if len(different) else len(window))
        yield slice(start, stop)
        start = stop


def _round_group(group: Columns, bits: int) -> torch.Tensor:
    """Numbers [L, R] of columns rounded with the best of several steps."""
    half, best_LR, inverse_LL = 1 << (bits - 1), group.best_LR, group.inverse_LL
    suited_R = best_LR.square().mean(0).sqrt() * _SUITED_STEP[bits]
    step_CR = torch.stack([suited_R * factor for factor in _FACTORS]).half().float().clamp_min(_LEAST_STEP)
    rest_LCR = best_LR[:, None, :].repeat(1, len(step_CR), 1)
    numbers_LCR = torch.empty_like(rest_LCR)
    for column in range(len(rest_LCR)):
        codes_CR = (rest_LCR[column] / step_CR).floor_().clamp_(-half, half - 1).add_(0.5)
        torch.mul(codes_CR, step_CR, out=numbers_LCR[column])
        error_CR = rest_LCR[column].sub_(numbers_LCR[column])
        following = rest_LCR[column + 1 :].flatten(1)
        following.addr_(inverse_LL[column, column + 1 :], error_CR.flatten(), alpha=-1)
    least_R = torch.einsum("l,lcr->cr", group.loss_L, rest_LCR.square()).argmin(0)
    return numbers_LCR[:, least_R, torch.arange(best_LR.shape[1])]


@contextmanager
def _writers(checkpoint: Checkpoint, folder: Path) -> Iterator[Mapping[str, SafetensorsWriter]]:
    """The files of a copy of a checkpoint, all in place but the matrices of sparse layers' feed-forward networks."""
    rounded = {
        name
        for layer in range(checkpoint.layer_count)
        if checkpoint.is_sparse(layer)
        for name in checkpoint.ffn_names(layer)
    }
    for name in (*checkpoint.side_files, INDEX_NAME):
        if (checkpoint.folder / name).is_file():
            (folder / name).parent.mkdir(exist_ok=True)
            copy_file(checkpoint.folder / name, folder / name)
    layouts: dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]] = {}
    for name, info in checkpoint.tensors.items():
        layouts.setdefault(info.file, {})[name] = (info.dtype, info.shape)
    with ExitStack() as stack:
        writers = {
            file: stack.enter_context(SafetensorsWriter(folder / file, layout))
            for file, layout in layouts.items()
        }
        for name, info in checkpoint.tensors.items():
            if name not in rounded:
                writers[info.file].copy(name, checkpoint.folder / info.file, info)
        yield writers
