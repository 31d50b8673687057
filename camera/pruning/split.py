"""How a budget of weights is split between fewer experts and narrower experts: `prune.experts: auto`.

Loaders read one number of experts and one width for all layers, so the only choice is that pair. One pass through the
original model tells what each would cost: the energy of what dropped experts put out, and CAMERA's importance, α = 0, of
the channels that go from those that stay and from what they share, both as shares of the energy of the residual stream
that they are missing in. Measured against the perplexity of the pruned models, this ranks the pairs as the perplexity does.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.errors import CameraError
from camera.files import read_json, write_json
from camera.layerwise.resume import clear_states
from camera.layerwise.statistics import BlockStatistics, Labelled
from camera.options import CaptureOptions
from camera.progress import Progress, silent
from camera.pruning.decision import Decision, Routed
from camera.pruning.execute import decide
from camera.pruning.importance import block_importance, kept_experts
from camera.pruning.plan import PrunePlan, Split, plan_statistics

SPLIT = "split.json"
NEARLY = 1.1
"""Losses this near to the least cannot be told apart. Then more experts stay: another kind of text needs other experts than
the calibration text, and misses those more than channels (docs/moe-quality.md)."""


def split_by_pass(
    checkpoint: Checkpoint,
    tokens_ST: torch.Tensor,
    plan: PrunePlan,
    options: CaptureOptions,
    work: Path,
    progress: Progress = silent,
) -> PrunePlan:
    """The plan with the split to take, found in a one-shot pass; the plan itself where it is split already.

    A killed run finds what it had chosen in `work`.

    Args:
        checkpoint: the source.
        tokens_ST: int64 [samples, tokens].
        plan: of `plan_prune`.
        options: of the pass.
        work: an existing folder.
        progress: told (samples done × layers, all).

    Raises:
        CameraError: as `camera.pruning.execute.decide`.
    """
    if not plan.candidates:
        return plan
    if (work / SPLIT).is_file():
        return plan.with_split([Split(*each) for each in read_json(work / SPLIT)])
    one_shot = options.model_copy(update={"propagate": "one-shot"})
    decisions: list[Decision] = list(
        decide(checkpoint, tokens_ST, plan_statistics(checkpoint), one_shot, work, progress=progress)
    )
    statistics = [{block.label: block.statistics for block in each.blocks} for each in decisions]
    losses = split_losses(checkpoint, plan, statistics, [each.routed for each in decisions])
    clear_states(work)
    write_json(work / SPLIT, losses)
    return plan.with_split(losses)


def split_losses(
    checkpoint: Checkpoint,
    plan: PrunePlan,
    statistics: Sequence[Labelled[BlockStatistics]],
    routed: Sequence[Routed | None],
) -> list[Split]:
    """What each candidate of a plan costs: first the one to take, then the others, the least first.

    Args:
        checkpoint: the source.
        plan: with candidates.
        statistics: of every block of every layer of the source.
        routed: what the router of every layer did.

    Raises:
        CameraError: if the statistics are not those of all experts.
    """
    experts = checkpoint.experts
    assert experts is not None
    groups = experts.groups(checkpoint.config)
    losses = dict.fromkeys(plan.candidates, 0.0)
    for layer, (of_blocks, of_layer) in enumerate(zip(statistics, routed, strict=True)):
        if of_layer is None:
            continue
        blocks = checkpoint.blocks(layer)
        if any(block.label not in of_blocks for block in blocks):
            raise CameraError("a split needs statistics of every expert: capture again, one-shot")
        lost = {
            block: _lost_by_width(block_importance(checkpoint, block, of_blocks[block.label], 0.0))
            for block in blocks
        }
        shared = [block for block in blocks if block.expert is None]
        for count, width in losses:
            kept_E = kept_experts(of_layer.energy_E, count, groups)
            missing = of_layer.energy_E.sum() - of_layer.energy_E[kept_E].sum()
            narrower = plan.narrowed_to(count, width)
            for block in [*(blocks[expert] for expert in kept_E.tolist()), *shared]:
                missing += lost[block][narrower.kept_of(block, len(lost[block]) - 1)]
            losses[count, width] += float(missing / of_layer.stream)
    return in_order([Split(*pair, loss) for pair, loss in losses.items()])


def in_order(splits: Sequence[Split]) -> list[Split]:
    """First the one to take: the most experts of those that cost nearly the least; then the others, the least first."""
    ascending = sorted(splits, key=lambda split: split.loss)
    near = [split for split in ascending if split.loss <= NEARLY * ascending[0].loss]
    taken = max(near, key=lambda split: split.experts_kept)
    return [taken, *(split for split in ascending if split is not taken)]


def _lost_by_width(importance_F: torch.Tensor) -> torch.Tensor:
    """The importance that goes when the K highest channels stay, for K from 0 to F: float64 [F + 1]."""
    ascending_F = importance_F.sort().values
    return torch.cat([ascending_F.new_zeros(1), ascending_F.cumsum(0)]).flip(0)
