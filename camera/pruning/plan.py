"""The plan of a prune: every number resolved and checked before a weight is read. Pure functions."""

from dataclasses import asdict, dataclass
from math import ceil
from typing import Any, Literal

from camera.checkpoints.checkpoint import Checkpoint
from camera.errors import CameraError
from camera.options import CaptureOptions, PruneOptions
from camera.registry import PRUNING_METHODS

_ROUNDS = 64
"""`obs` removes a 64th of the channels in a round, unless the options say otherwise."""


@dataclass(frozen=True)
class PrunePlan:
    """What is kept of every layer, and how it is chosen."""

    width: int
    """FFN channels of each layer of the source."""
    kept: int
    """FFN channels of each layer that stay."""
    method: str
    """Name in `PRUNING_METHODS`."""
    reduce_ratio: float
    """CAMERA's α."""
    damping: float
    """Of a method that solves equations: share of the mean second moment added to each channel's own."""
    round: int
    """Of `obs`: channels removed before weights and costs are updated."""
    sparsity: float
    """Share of the weights that stay to set to zero."""
    mode: Literal["physical", "mask"]
    sequential: bool
    """Whether a layer sees the pruned layers below it."""

    @property
    def removes(self) -> bool:
        """Whether any channel goes."""
        return self.kept < self.width

    @property
    def changes(self) -> bool:
        """Whether any matrix will be another than the source's."""
        return self.removes or self.sparsity > 0

    @property
    def needs_gram(self) -> bool:
        """Whether statistics of single channels are not enough to decide."""
        return self.removes and bool(PRUNING_METHODS[self.method].needs_gram)

    @property
    def decides_in_capture(self) -> bool:
        """Whether a layer is decided while it runs: its activations, or what the next layer sees, depend on it."""
        return self.sequential or self.needs_gram or self.sparsity > 0

    def identity(self) -> dict[str, Any]:
        """What an unfinished capture depends on."""
        return {name: value for name, value in asdict(self).items() if name != "mode"}


def plan_prune(checkpoint: Checkpoint, capture: CaptureOptions, options: PruneOptions) -> PrunePlan:
    """Resolve the options for a model.

    Raises:
        CameraError: if nothing would be pruned.
    """
    width = checkpoint.ffn_width
    return PrunePlan(
        width=width,
        kept=kept_width(width, options.ratio, options.multiple_of),
        method=options.method,
        reduce_ratio=options.reduce_ratio,
        damping=options.damping,
        round=options.round or max(1, width // _ROUNDS),
        sparsity=options.sparsity,
        mode=options.mode,
        sequential=capture.propagate == "sequential",
    )


def plan_statistics(checkpoint: Checkpoint) -> PrunePlan:
    """The plan of a one-shot capture that decides nothing, so that its statistics serve every ratio and α."""
    one_shot = CaptureOptions(propagate="one-shot")
    return plan_prune(checkpoint, one_shot, PruneOptions(ratio=0))


def kept_width(width: int, ratio: float, multiple_of: int) -> int:
    """How many of `width` channels stay: ceil((width − int(width·ratio)) / multiple_of)·multiple_of.

    Never more than `width`. Ratio 0 keeps all.

    Raises:
        CameraError: if a ratio above 0 ends up removing nothing, as 20 % of 172 in multiples of 64 does.
    """
    if ratio == 0:
        return width
    wanted = width - int(width * ratio)
    kept = min(width, ceil(wanted / multiple_of) * multiple_of)
    if kept == width:
        raise CameraError(
            f"prune.ratio {ratio} of {width} FFN channels leaves {wanted}, and rounded up to a multiple of "
            f"{multiple_of} that is all of them: nothing would be pruned. "
            f"Raise prune.ratio or lower prune.multiple_of (4 suits llama.cpp's f16; int4 on the NPU wants 64)"
        )
    return kept
