"""Every way to multiply with 4-bit blocks that the device has, at every shape of openPangu: right or not, and how fast.

On an NPU each layout of weights is tried in processes of its own (`int4_trials`); elsewhere the kernels are tried here. The
16-bit product of the same shape stands beside.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from camera.device_check.context import Context
from camera.device_check.schema import Measurement
from camera.devices import release_memory
from camera.engines.parts.graph import FAILURES, GRAPHS
from camera.engines.parts.int4_choice import KERNELS
from camera.engines.parts.int4_linear import INT4_TYPES, Int4Linear, rows_of_a_part
from camera.engines.parts.int4_measure import (
    TOKENS,
    is_wrong,
    relative_error,
    seconds_of,
    tokens_and_products,
)
from camera.engines.parts.int4_trial import Key, Shape, Trial, random_blocks
from camera.engines.parts.int4_trials import try_layouts
from camera.registry import BLOCK_FORMATS

_SIXTEEN_BITS, _TIME = "16 bits", "time of a product"


def run(context: Context) -> None:
    """Try all; of each shape and type one way at least must be right."""
    device = context.device
    parts = dict(_part(*each, KERNELS[device.type]) for each in context.shapes.matrices.items())
    matrices = {
        (matrix, type): Shape(rows, columns, BLOCK_FORMATS[type].block_length)
        for matrix, (rows, columns) in parts.items()
        for type in INT4_TYPES
    }
    of_shape: dict[Shape, list[dict[str, str | int]]] = defaultdict(list)
    for (matrix, type), shape in matrices.items():
        of_shape[shape].append({"matrix": matrix, "type": type})

    def tell(trial: Trial) -> None:
        for of in of_shape[trial.key.shape]:
            _tell(context, of, trial)

    if device.type == "npu":
        # Not what an earlier run kept: it is measured now.
        trials = try_layouts(sorted(of_shape), device, fresh=True, tell=tell)
    else:
        trials = []
        for shape in sorted(of_shape):
            for trial in _trials_here(shape, device):
                trials.append(trial)
                tell(trial)
    for (matrix, type), shape in matrices.items():
        _judge(
            context, {"matrix": matrix, "type": type}, [each for each in trials if each.key.shape == shape]
        )
    for matrix, shape_of_part in parts.items():
        _measure_wide(context, matrix, shape_of_part)


def _part(
    matrix: str, shape: tuple[int, int], kernels: Sequence[type[Int4Linear]]
) -> tuple[str, tuple[int, int]]:
    """What is multiplied with at once, by name, and its rows and columns: a matrix, or a part if no kernel takes all."""
    rows = rows_of_a_part(shape[0], kernels)
    parts = -(-shape[0] // rows)
    return matrix if parts == 1 else f"{matrix}, one of {parts} parts", (rows, shape[1])


def _tell(context: Context, of: dict[str, str | int], trial: Trial) -> None:
    """One trial."""
    way = trial.layout + (f", inner_precise={trial.inner_precise}" if trial.inner_precise else "")
    where = {**of, "way": way, "tokens": trial.tokens}
    context.add(
        Measurement(
            what=_TIME,
            of={**where, "kernel": trial.kernel or "", "recorded": str(trial.recorded)},
            value=trial.microseconds,
            unit="µs",
            error=trial.error,
            optional=True,
        )
    )
    if trial.relative_error is not None:
        context.add(Measurement(what="relative error", of=where, value=trial.relative_error))


def _judge(context: Context, of: dict[str, str | int], trials: list[Trial]) -> None:
    """Whether one way at least is right for a shape and type, with every number of tokens."""
    wrong = {trial.key.variant for trial in trials if trial.error is not None}
    right = {trial.key.variant for trial in trials} - wrong
    shape = trials[0].key.shape
    context.add(
        Measurement(
            what="ways that are right",
            of={**of, "rows": shape.rows, "columns": shape.columns},
            value=len(right),
            at_least=1,
            error=None if right else "; ".join(sorted({str(trial.error) for trial in trials})),
        )
    )


def _trials_here(shape: Shape, device: torch.device) -> Iterator[Trial]:
    """The kernels of a GPU or a CPU, in this process; one that fails is not asked again."""
    blocks = random_blocks(shape)
    for kind in KERNELS[device.type]:
        reason = kind.why_not(*shape)
        made: tuple[Int4Linear, torch.Tensor, torch.Tensor] | None = None
        for tokens in TOKENS:
            found: dict[str, Any] = {}
            try:
                if reason is None:
                    made = made or (
                        kind(blocks, None, device),
                        *tokens_and_products(blocks, max(TOKENS), kind.dtype),
                    )
                    found = _tried_here(*made, tokens, device)
            except FAILURES as error:
                reason = f"failed with {tokens} tokens: {type(error).__name__}: {error}"
            yield Trial(
                **Key(kind.kernel, 0, *shape, tokens)._asdict(),
                kernel=kind.kernel,
                **({"error": reason} if reason else found),
            )


def _tried_here(
    layer: Int4Linear, x_MK: torch.Tensor, exact_MN: torch.Tensor, tokens: int, device: torch.device
) -> dict[str, Any]:
    """What a trial found."""
    error = relative_error(layer, x_MK[:tokens], exact_MN[:tokens], device)
    found = {"relative_error": error if math.isfinite(error) else None}
    if is_wrong(layer, error):
        return found | {"error": f"off by {error:.1%} against dequantised weights"}
    recorded = device.type in GRAPHS
    seconds = seconds_of(layer, device, tokens, recorded=recorded)
    return found | {"recorded": recorded, "microseconds": round(1e6 * seconds, 2)}


class _Wide(Int4Linear):
    """The same product with weights in 16 bits, to be timed as the others are."""

    kernel = _SIXTEEN_BITS

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.group = columns, rows, 0
        self.dtype = KERNELS[device.type][0].dtype  # type: ignore[misc] # the class has none
        row = torch.randn(columns, generator=torch.Generator().manual_seed(0)).to(self.dtype)
        self.register_buffer("packed", row.repeat(rows, 1).to(device), persistent=False)
        self.register_buffer("bias", None, persistent=False)

    def matmul(self, x_MK: torch.Tensor) -> torch.Tensor:
        return F.linear(x_MK, self.packed)


def _measure_wide(context: Context, matrix: str, shape: tuple[int, int]) -> None:
    device, recorded = context.device, context.device.type in GRAPHS
    layer = _Wide(*shape, device)
    for tokens in TOKENS:
        of: dict[str, str | int] = {"matrix": matrix, "type": _SIXTEEN_BITS, "way": _SIXTEEN_BITS}
        of |= {"tokens": tokens, "recorded": str(recorded)}
        try:
            seconds = seconds_of(layer, device, tokens, recorded=recorded)
        except FAILURES as error:
            told = f"{type(error).__name__}: {error}"
            context.add(Measurement(what=_TIME, of=of, unit="µs", error=told, optional=True))
            return
        context.add(Measurement(what=_TIME, of=of, value=round(1e6 * seconds, 2), unit="µs"))
    del layer
    release_memory(device)
