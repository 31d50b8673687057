"""Which 4-bit kernel multiplies a matrix: one that is right on this device and, where several are, the fastest for the shape."""

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from time import perf_counter

import torch
import torch.nn.functional as F

from camera.engines.parts.blocks import Blocks
from camera.engines.parts.graph import FAILURES, GRAPHS, compile_many_shapes
from camera.engines.parts.int4_linear import (
    BlockwiseInt4Linear,
    CpuInt4Linear,
    CudaInt4Linear,
    Int4Linear,
    Int4Parts,
    rows_of_a_part,
)
from camera.engines.parts.int4_measure import (
    TOKENS,
    is_wrong,
    relative_error,
    seconds_of,
    tokens_and_products,
)
from camera.engines.parts.int4_npu import LAYOUTS, NpuInt4Linear
from camera.engines.parts.int4_trial import Shape, Trial
from camera.engines.parts.int4_trials import TrialsError, fastest, try_layouts
from camera.formats.blocks import quantize
from camera.options import BlockType

log = logging.getLogger(__name__)

KERNELS: dict[str, tuple[type[Int4Linear], ...]] = {
    "cpu": (CpuInt4Linear,),
    "cuda": (CudaInt4Linear, BlockwiseInt4Linear),
    "npu": (NpuInt4Linear,),
}
"""The 4-bit linear layers of each kind of device that are tried in this process, best first."""
_MUST_WIN_BY = 0.15
"""Of the time: what a kernel that challenges another must save."""
_TRIAL_SECONDS = 60.0
"""All trials of a model in this process; when they are over no further kernel may challenge."""
Make = Callable[[Blocks, torch.Tensor | None, torch.device], Int4Linear]


class KernelChoice:
    """Makes the 4-bit linear layers of a model; each shape is tried once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.microseconds: dict[str, dict[str, float]] = {}
        """Of one token, by shape and kernel, where several were tried."""
        self.untried: str | None = None
        """Why an NPU's layouts of weights were not tried, so that the plain one is used."""
        self._trials: dict[Shape, list[Trial]] = {}
        self._chosen: dict[str, Make | str] = {}
        self._seconds_left = _TRIAL_SECONDS
        if any(kind.challenges for kind in KERNELS[device.type]):
            compile_many_shapes()

    def prepare(self, matrices: Iterable[Blocks]) -> None:
        """Try all at once what is tried in processes of its own: they start slowly.

        Args:
            matrices: that `layer` will be asked for.
        """
        if self.device.type != "npu":
            return
        rows = [(blocks, rows_of_a_part(blocks.rows, KERNELS["npu"])) for blocks in matrices]
        shapes = {Shape(count, blocks.columns, blocks.group) for blocks, count in rows}
        self._try(sorted(shape for shape in shapes if NpuInt4Linear.why_not(*shape) is None))

    def layer(self, blocks: Blocks, bias: torch.Tensor | None) -> Int4Linear | Int4Parts | str:
        """The best 4-bit linear layer for some blocks, or why they must be dequantised."""
        rows = rows_of_a_part(blocks.rows, KERNELS[self.device.type])
        parts: list[Int4Linear] = []
        for start in range(0, blocks.rows, rows):
            part_bias = None if bias is None else bias[start : start + rows]
            if part_bias is not None:
                part_bias = F.pad(part_bias, (0, rows - len(part_bias)))
            part = self._part(blocks.part(start, start + rows), part_bias)
            if isinstance(part, str):
                return part
            parts.append(part)
        return parts[0] if rows == blocks.rows else Int4Parts(parts, blocks.rows)

    def _part(self, blocks: Blocks, bias: torch.Tensor | None) -> Int4Linear | str:
        """A layer for as many rows as the kernels take."""
        name = f"{blocks.type} {blocks.rows} x {blocks.columns}"
        if name not in self._chosen:
            choose = self._by_trials if self.device.type == "npu" else self._by_challenge
            self._chosen[name] = choose(name, blocks)
        chosen = self._chosen[name]
        return chosen if isinstance(chosen, str) else chosen(blocks, bias, self.device)

    def _by_trials(self, name: str, blocks: Blocks) -> Make | str:
        """The layout that was fastest in trials, or the plain one where none can be held."""
        shape = Shape(blocks.rows, blocks.columns, blocks.group)
        if (reason := NpuInt4Linear.why_not(*shape)) is not None:
            return reason
        if shape not in self._trials:
            self._try([shape])
        if self.untried is not None:
            return usable(NpuInt4Linear, self.device, blocks.type) or NpuInt4Linear
        trials = self._trials[shape]
        self.microseconds[name] = {
            f"{trial.layout}, inner_precise={trial.inner_precise}": trial.microseconds
            for trial in trials
            if trial.tokens == 1 and trial.microseconds is not None
        }
        best = fastest(trials, shape)
        if best is None:
            return f"no layout is right for {name}: " + "; ".join(
                sorted({str(trial.error) for trial in trials})
            )
        return partial(LAYOUTS[best.layout], inner_precise=best.inner_precise)

    def _try(self, shapes: Sequence[Shape]) -> None:
        """Hold trials of shapes, or find out why none can be held."""
        try:
            for trial in try_layouts(shapes, self.device) if shapes and self.untried is None else ():
                self._trials.setdefault(trial.key.shape, []).append(trial)
        except TrialsError as error:
            self.untried = str(error)
            log.warning("int4 weights stay in the plain layout, which may be the slower one: %s", error)

    def _by_challenge(self, name: str, blocks: Blocks) -> Make | str:
        """The first kernel that is right here, or one that challenges it and is clearly faster."""
        reasons, kinds = [], []
        for kind in KERNELS[self.device.type]:
            reason = kind.why_not(blocks.rows, blocks.columns, blocks.group)
            reason = reason or usable(kind, self.device, blocks.type)  # type: ignore[arg-type] # a class is hashable
            if reason is None:
                kinds.append(kind)
            else:
                reasons.append(reason)
        if not kinds:
            return "; ".join(reasons)
        best = kinds[0]
        for kind in kinds[1:]:
            if kind.challenges and self._seconds_left > 0:
                began = perf_counter()
                best = self._faster(name, best(blocks, None, self.device), kind(blocks, None, self.device))
                self._seconds_left -= perf_counter() - began
        return best

    def _faster(self, name: str, best: Int4Linear, other: Int4Linear) -> type[Int4Linear]:
        """The other if it computes the same and saves enough time."""
        times = self.microseconds.setdefault(name, {})
        try:
            for layer in (best, other):
                seconds = seconds_of(layer, self.device, recorded=self.device.type in GRAPHS)
                times[layer.kernel] = round(1e6 * seconds, 2)
        except FAILURES as error:
            log.warning("%s is not used for %s: %s", other.kernel, name, error)
            return type(best)
        x_1K = torch.linspace(-1, 1, best.in_features)[None].to(best.dtype)
        expected_1N = best(x_1K.to(self.device)).float().cpu()
        error_ratio = relative_error(other, x_1K, expected_1N, self.device)
        if not error_ratio <= 8 * torch.finfo(best.dtype).eps:
            log.warning("%s is not used for %s: off by %.1f %%", other.kernel, name, 100 * error_ratio)
            return type(best)
        wins = times[other.kernel] <= (1 - _MUST_WIN_BY) * times[best.kernel]
        return type(other) if wins else type(best)


@cache
def usable(kind: type[Int4Linear], device: torch.device, block_type: BlockType) -> str | None:
    """Try a kernel once on a small random matrix against dequantised weights, with every number of tokens.

    Returns:
        None if they agree within the rounding of the kernel's dtype, else what went wrong, which is logged too.
    """
    rows, columns = 128, 512
    random = torch.Generator().manual_seed(0)
    blocks = Blocks(block_type, quantize(torch.randn((rows, columns), generator=random), block_type))
    x_MK, exact_MN = tokens_and_products(blocks, max(TOKENS), kind.dtype)
    try:
        layer = kind(blocks, None, device)
        errors = [relative_error(layer, x_MK[:count], exact_MN[:count], device) for count in TOKENS]
    except FAILURES as failure:
        reason = f"{kind.kernel} failed on {device}: {failure}"
    else:
        wrong = [error for error in errors if is_wrong(kind, error)]
        if not wrong:
            return None
        reason = f"{kind.kernel} on {device} is off by {wrong[0]:.1%} against dequantised weights"
    log.warning("%s is not used for %s: %s", kind.kernel, block_type, reason)
    return reason
