"""The plan of a prune: every number resolved and checked before a weight is read. Pure functions."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil, gcd
from typing import Any, Literal, NamedTuple

from camera.checkpoints.checkpoint import Checkpoint
from camera.devices import dtype_name
from camera.errors import CameraError
from camera.models import Block
from camera.options import CaptureOptions, PruneOptions
from camera.registry import PRUNING_METHODS

_GROUPED_ROW_BYTES = 16
"""torch's grouped matrix product takes rows of a multiple of so many bytes."""
_ROUNDS = 64
"""`obs` removes a 64th of the channels in a round, unless the options say otherwise."""

DAMPINGS, EXPERTS_DAMPING = (1e-3, 1e-2, 1e-1, 1.0), 0.1
"""Of refits, where the options leave it open: those to try on held-back tokens, and that of experts."""


class Cut(NamedTuple):
    """A width that changes."""

    key: str
    """Of config.json."""
    width: int
    """In the source."""
    kept: int
    """In the pruned model."""


class Split(NamedTuple):
    """One way to spend a budget of weights."""

    experts_kept: int
    kept: int
    """Channels of each expert."""
    loss: float
    """Estimated: share of the residual stream's energy that goes missing, summed over layers."""


@dataclass(frozen=True)
class PrunePlan:
    """What is kept of every layer, and how it is chosen."""

    cuts: tuple[Cut, ...]
    """The widths of the blocks that are pruned; the first is that of a dense layer, or of every expert."""
    experts: int
    """Experts of each sparse layer of the source; 0 for a dense model."""
    experts_kept: int
    """Experts of each sparse layer that stay."""
    scope: Literal["expert", "layer"]
    """Whether each block keeps equally many channels of its own choice, or a layer's channels are ranked together."""
    method: str
    """Name in `PRUNING_METHODS`."""
    reduce_ratio: float
    """CAMERA's α."""
    dampings: tuple[float, ...]
    """Of a method that solves equations: share of the mean second moment added to each channel's own. Of several, a refit takes
    what is best on held-back tokens, and a choice of channels the least."""
    round: int
    """Of `obs`: channels removed before weights and costs are updated."""
    sparsity: float
    """Share of the weights that stay to set to zero."""
    mode: Literal["physical", "mask"]
    sequential: bool
    """Whether a layer sees the pruned layers below it."""
    target: Literal["source", "layer"] = "layer"
    """What a refit brings a layer's output near to: that of the source model, whose hidden states are then computed too, or
    that of the layer itself when it is whole."""
    candidates: tuple[tuple[int, int], ...] = ()
    """Pairs of experts and channels that keep to the budget, while it is not decided which; the plan is then of the first."""
    considered: tuple[Split, ...] = ()
    """What was decided from, the chosen one first."""

    @property
    def width(self) -> int:
        """Channels of every block of the source that is pruned; of a mixture of experts those of one expert."""
        return self.cuts[0].width

    @property
    def kept(self) -> int:
        """Of `width`, the channels that stay."""
        return self.cuts[0].kept

    def kept_of(self, block: Block, width: int) -> int:
        """How many of a block's channels stay: all where its width is not one that changes."""
        for cut in self.cuts:
            if cut.key == block.width_key:
                return block.times * cut.kept
        return width

    @property
    def narrows(self) -> bool:
        """Whether any channel goes."""
        return any(cut.kept < cut.width for cut in self.cuts)

    @property
    def drops(self) -> bool:
        """Whether whole experts go."""
        return self.experts_kept < self.experts

    @property
    def removes(self) -> bool:
        """Whether any channel or expert goes."""
        return self.narrows or self.drops

    @property
    def changes(self) -> bool:
        """Whether any matrix will be another than the source's."""
        return self.removes or self.sparsity > 0

    @property
    def needs_gram(self) -> bool:
        """Whether statistics of single channels are not enough to decide."""
        return self.removes and bool(PRUNING_METHODS[self.method].needs_gram)

    @property
    def streams(self) -> int:
        """How many times hidden states are computed: those of the source model too where refits follow them."""
        return 2 if self.needs_gram and self.target == "source" else 1

    @property
    def decides_in_capture(self) -> bool:
        """Whether a layer is decided while it runs: its activations, or what the next layer sees, depend on it.

        Where experts go, those that stay get other tokens, and their channels are chosen by these.
        """
        may_drop = self.drops or bool(self.candidates)
        other = self.removes and self.method != "camera"  # scores alone are CAMERA's choice
        return self.sequential or other or self.sparsity > 0 or may_drop

    @property
    def removed_share(self) -> float:
        """Of the parameters of the blocks that are pruned, those that go; experts alone where there are any."""
        experts = self.experts_kept / self.experts if self.experts else 1.0
        return 1 - experts * self.kept / self.width

    def config_changes(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """The keys of config.json that a physically pruned model has other values of."""
        changes: dict[str, Any] = {cut.key: cut.kept for cut in self.cuts if cut.kept < cut.width}
        family = checkpoint.family
        changes |= self.expert_count_changes(checkpoint)
        if changes and checkpoint.prediction_tensors:
            changes[str(family.prediction_layers_key)] = 0
        return changes | family.restated(checkpoint.config, changes)

    def expert_count_changes(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """The keys of config.json that say how many experts there are, with their new value."""
        experts = checkpoint.family.experts
        if not self.drops or experts is None:
            return {}
        keys = [key for key in experts.count_keys if key in checkpoint.config]
        return dict.fromkeys(keys or experts.count_keys[:1], self.experts_kept)

    def with_split(self, losses: Sequence[Split]) -> "PrunePlan":
        """The plan with the first of the splits, which is the one to take."""
        best = losses[0]
        plan = self.narrowed_to(best.experts_kept, best.kept)
        return replace(plan, candidates=(), considered=tuple(losses))

    def narrowed_to(self, experts_kept: int, kept: int) -> "PrunePlan":
        """The plan with so many experts and channels; what experts share keeps the same share of its own channels."""
        first, *others = self.cuts
        cuts = [first._replace(kept=kept)]
        for cut in others:
            step = gcd(kept, 64)  # as even as the experts' width is
            cuts.append(cut._replace(kept=min(cut.width, ceil(cut.width * kept / first.width / step) * step)))
        return replace(self, cuts=tuple(cuts), experts_kept=experts_kept)

    def identity(self) -> dict[str, Any]:
        """What an unfinished capture depends on."""
        left_out = ("mode", "considered")
        return {name: value for name, value in asdict(self).items() if name not in left_out}


def plan_prune(checkpoint: Checkpoint, capture: CaptureOptions, options: PruneOptions) -> PrunePlan:
    """Resolve the options for a model.

    Raises:
        CameraError: if nothing would be pruned, the model has no experts to drop, or none would compute with what is left.
    """
    widths = {key: int(checkpoint.config[key]) for key in checkpoint.family.width_keys(checkpoint.config)}
    widths[next(iter(widths))] = checkpoint.ffn_width  # checked
    auto = options.experts == "auto"
    dropped = options.experts if isinstance(options.experts, float) else 0.0
    cuts = tuple(
        Cut(key, width, width if auto else kept_width(width, options.ratio, options.multiple_of))
        for key, width in widths.items()
    )
    plan = PrunePlan(
        cuts=cuts,
        experts=checkpoint.expert_count,
        experts_kept=kept_experts(checkpoint, dropped),
        scope=options.scope,
        method=options.method,
        reduce_ratio=options.reduce_ratio,
        dampings=_dampings(checkpoint, options.damping),
        round=options.round or max(1, cuts[0].width // _ROUNDS),
        sparsity=options.sparsity,
        mode=options.mode,
        sequential=capture.propagate == "sequential",
        target=_target(checkpoint, capture, options),
    )
    if auto:
        candidates = splits(checkpoint, options.ratio, options.multiple_of)
        plan = replace(plan.narrowed_to(*candidates[0]), candidates=tuple(candidates))
    _check_alignment(checkpoint, plan)
    return plan


def _target(
    checkpoint: Checkpoint, capture: CaptureOptions, options: PruneOptions
) -> Literal["source", "layer"]:
    """What is asked for, where it can be: not through a norm behind the down projection."""
    normed = any(block.norm is not None for block in checkpoint.blocks(0))
    if capture.propagate == "one-shot" or checkpoint.experts or normed:
        return "layer"
    return options.target


def _dampings(checkpoint: Checkpoint, asked: float | None) -> tuple[float, ...]:
    if asked is not None:
        return (asked,)
    return (EXPERTS_DAMPING,) if checkpoint.experts else DAMPINGS


def _check_alignment(checkpoint: Checkpoint, plan: PrunePlan) -> None:
    """Raise CameraError for widths of experts that transformers saves and loads, and then does not compute with."""
    if not plan.experts or plan.mode == "mask":
        return
    step = _GROUPED_ROW_BYTES // checkpoint.dtype.itemsize
    for kept in ({kept for _, kept in plan.candidates} | {plan.kept}) - {plan.width}:
        if kept % step:
            raise CameraError(
                f"prune would keep {kept} channels of each expert, and transformers multiplies all experts at once only if "
                f"they are a multiple of {step} in {dtype_name(checkpoint.dtype)}: set prune.multiple_of to {step}, or to a "
                "multiple of it"
            )


def splits(checkpoint: Checkpoint, ratio: float, multiple_of: int) -> list[tuple[int, int]]:
    """Every number of experts with the most channels that leaves at most 1 − `ratio` of all experts' weights.

    The most experts first.

    Raises:
        CameraError: if the model has no experts, or no pair keeps to the budget.
    """
    experts = checkpoint.experts
    if experts is None:
        raise CameraError(f"prune.experts: {checkpoint.folder} has no experts to drop: leave it out")
    count, width, config = checkpoint.expert_count, checkpoint.ffn_width, checkpoint.config
    budget, groups = int((1 - ratio) * count * width), experts.groups(config)
    found: list[tuple[int, int]] = []
    for kept in range(count, 0, -groups):
        channels = min(width, budget // kept)
        if channels < width:
            channels = channels // multiple_of * multiple_of
        if channels and kept >= experts.least(config):
            found.append((kept, channels))
        if channels == width:
            break  # fewer experts would only lose more
    if not found:
        raise CameraError(
            f"prune.ratio {ratio} leaves no expert with {multiple_of} channels: lower it, or prune.multiple_of"
        )
    return found


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


def kept_experts(checkpoint: Checkpoint, share: float) -> int:
    """How many experts of each layer stay: E − int(E·share), rounded up to fill the router's groups.

    Raises:
        CameraError: if there are none to drop, if too few would stay for what a token is routed to, or if a share above 0
            ends up dropping none.
    """
    experts = checkpoint.experts
    if share == 0:
        return checkpoint.expert_count
    if experts is None:
        raise CameraError(f"prune.experts: {checkpoint.folder} has no experts to drop: leave it out")
    count, groups = experts.count(checkpoint.config), experts.groups(checkpoint.config)
    kept = ceil((count - int(count * share)) / groups) * groups
    if kept == count:
        raise CameraError(
            f"prune.experts {share} of {count} experts in {groups} groups of the router drops none: raise it"
        )
    if kept < (least := experts.least(checkpoint.config)):
        raise CameraError(
            f"prune.experts {share} leaves {kept} of {count} experts, and the router needs {least} to choose from: lower it"
        )
    return kept
