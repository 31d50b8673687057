"""CAMERA's importance of a micro-expert, and the channels of the highest. Pure functions.

A micro-expert is one FFN channel: a row of gate, a row of up, and a column of down.
Source: CAMERA (AAAI 2026), the pruning criterion.
"""

import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.devices import has_float64
from camera.layerwise.statistics import BlockStatistics, Labelled
from camera.layerwise.sums import ExactSum
from camera.models import Block

FEW_TOKENS = 8
"""With fewer tokens than this an expert's channels are ranked by their weights."""
_ROWS_AT_ONCE_ON_DEVICE = 1024
_ROWS_AT_ONCE = 32  # of a down projection in float64: 3 MB for 12,800 channels, which stays in the cache


def importance(statistics: BlockStatistics, down_HF: torch.Tensor, reduce_ratio: float) -> torch.Tensor:
    """E_c = ‖w_down,c‖² · [(1 − α)·Σ_t a_tc² + α·max_t a_tc²], α = `reduce_ratio`.

    Args:
        statistics: sums over the calibration tokens t of the activations a that enter `down_proj`.
        down_HF: the down projection [hidden, F], any dtype.
        reduce_ratio: α in [0, 1].

    Returns:
        float64 [F] on the CPU.
    """
    norm_F = _column_norms(down_HF)
    largest_F = statistics.max_abs_F.double().square()
    return norm_F * ((1 - reduce_ratio) * statistics.sum_squares_F + reduce_ratio * largest_F)


def _column_norms(down_HF: torch.Tensor) -> torch.Tensor:
    """Σ of squares of each column, float64 [F] on the CPU."""
    device, total_F = down_HF.device, ExactSum((down_HF.shape[1],), down_HF.device)
    wide = torch.float64 if has_float64(device) else torch.float32
    for rows_RF in down_HF.split(_ROWS_AT_ONCE if device.type == "cpu" else _ROWS_AT_ONCE_ON_DEVICE):
        total_F.add(rows_RF.to(wide).square().sum(dim=0))
    return total_F.read()


def too_few(blocks: Labelled[BlockStatistics]) -> dict[str, int]:
    """The experts of a layer that too few tokens visited to tell their channels apart, with the tokens."""
    return {
        label: found.tokens
        for label, found in blocks.items()
        if label.startswith("experts.") and found.tokens < FEW_TOKENS
    }


def block_importance(
    checkpoint: Checkpoint,
    block: Block,
    statistics: BlockStatistics,
    reduce_ratio: float,
    down_HF: torch.Tensor | None = None,
) -> torch.Tensor:
    """`importance` of a block's channels; of an expert that fewer than `FEW_TOKENS` tokens visited the product of the squared norms
    of its three vectors, which is all there is to tell its channels apart.

    Args:
        checkpoint: of the block.
        block: a feed-forward network.
        statistics: of it.
        reduce_ratio: α in [0, 1].
        down_HF: its down projection in the checkpoint's dtype, if it is at hand.

    Returns:
        float64 [F] on the CPU.

    Raises:
        CameraError: if a matrix holds NaN or infinity.
    """
    if block.expert is None or statistics.tokens >= FEW_TOKENS:
        return importance(
            statistics, checkpoint.read_finite(block.down) if down_HF is None else down_HF, reduce_ratio
        )
    ones = BlockStatistics.zeros(len(statistics.sum_squares_F))
    ones.sum_squares_F += 1
    scores_F = importance(ones, checkpoint.read_finite(block.down), 0.0)
    for name in (block.gate, block.up):
        scores_F *= torch.linalg.vector_norm(checkpoint.read_finite(name).float(), dim=1).double().square()
    return scores_F


def joint_channels(scores: Labelled[torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    """The `count` channels of highest importance of a whole layer, ranked together, by block; see `kept_channels`."""
    kept = kept_channels(torch.cat(list(scores.values())), count)
    found, start = {}, 0
    for label, scores_F in scores.items():
        stop = start + len(scores_F)
        found[label] = kept[(kept >= start) & (kept < stop)] - start
        start = stop
    return found


def kept_experts(energy_E: torch.Tensor, count: int, groups: int = 1) -> torch.Tensor:
    """The `count` experts of the highest energy, equally many of each group; of equals the first stays.

    Args:
        energy_E: [E], finite.
        count: a multiple of `groups`.
        groups: of equally many consecutive experts.

    Returns:
        int64 [count], ascending.
    """
    size = len(energy_E) // groups
    parts = [
        kept_channels(part_N, count // groups) + number * size
        for number, part_N in enumerate(energy_E.split(size))
    ]
    return torch.cat(parts)


def kept_channels(importance_F: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` channels of highest importance, in their original order; of equals the first stays.

    Args:
        importance_F: [F], finite.

    Returns:
        int64 [count], ascending.
    """
    order = torch.sort(importance_F.cpu(), descending=True, stable=True).indices
    return order[:count].sort().values
