"""What it costs a model to store a matrix as a type: how much of the residual stream becomes noise.

Rounding a matrix changes its output on the calibration tokens by a share e² of its power: Σ_j m_j·Σ_i Δ_ij² over
Σ_j m_j·Σ_i w_ij², m_j being the mean square of input j. That share of what its branch (attention, or the feed-forward
network) adds to the residual stream is noise there, and later layers read the stream through a norm, so what counts is the
branch's power in proportion to the stream's at that point. The head and the embedding are a branch by themselves.

Powers are those of uncorrelated inputs, and the stream's is the sum of what was added. So the importance matrix and the
weights tell everything, and a file of llama.cpp will do. An expert is a branch that counts by its tokens' share of all; what
the router multiplies its output by is in no such file, and is taken as 1 over the experts that a token goes to. An expert
without tokens adds nothing.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.rows import Rows
from camera.formats import blocks
from camera.options import BlockType
from camera.progress import Progress, silent
from camera.quantization.imatrix import Imatrix

_HEAD = 3.0
"""Relative weight of errors of the output head against errors in the residual stream, whose power the sum of branches
underestimates. Measured: docs/quantization.md."""
_ROWS_WEIGHTS = 1 << 22
"""Weights of whole rows that are stored in every type at once."""


def sensitivities(
    checkpoint: Checkpoint,
    imatrix: Imatrix,
    types: Mapping[str, Iterable[BlockType]],
    progress: Progress = silent,
) -> dict[str, dict[BlockType, float]]:
    """Of each matrix the share of the residual stream that becomes noise, for each type that it may get.

    Types are judged as rounding to the nearest stores them.

    Args:
        checkpoint: the model.
        imatrix: second moments of the inputs; a matrix it does not know counts its inputs alike.
        types: by name of the matrix, the types to judge.
        progress: called with (matrices done, all).

    Raises:
        CameraError: if a weight is missing or does not fit a type.
    """
    share = _branch_shares(checkpoint, imatrix)
    share[checkpoint.family.name("head")] = _HEAD
    found: dict[str, dict[BlockType, float]] = {}
    for name, choices in types.items():
        rows, importance = checkpoint.rows(name), imatrix.importance(name)
        noise = _relative_errors(rows, tuple(choices), importance, name)
        if (
            name == checkpoint.embedding == checkpoint.head
        ):  # it is the head as well, which its importance is of
            as_embedding = _relative_errors(rows, tuple(choices), None, name)
            noise = {type: _HEAD * error + as_embedding[type] for type, error in noise.items()}
        found[name] = {type: share.get(name, 1.0) * error for type, error in noise.items()}
        progress(len(found), len(types))
    return found


def _branch_shares(checkpoint: Checkpoint, imatrix: Imatrix) -> dict[str, float]:
    """Of each matrix in a decoder layer: what its branch adds to the stream, over the stream's power after that."""
    embedding = checkpoint.rows(checkpoint.embedding)
    scales, config = checkpoint.family.scales, checkpoint.config
    stream = scales.embedding(config) ** 2 * float(_powers(embedding).sum()) / embedding.shape[0]
    shares: dict[str, float] = {}
    for layer in range(checkpoint.layer_count):
        attention, *_ = checkpoint.family.branches(checkpoint.config, layer)
        feed_forward = [(block.names, block.expert is not None) for block in checkpoint.blocks(layer)]
        for together in ([(attention, False)], feed_forward):
            added = [
                scales.branch(config) ** 2 * _added(checkpoint, imatrix, names[-1], stream, routed=routed)
                for names, routed in together
            ]
            stream += sum(added)
            for (names, _), power in zip(together, added, strict=True):
                shares |= dict.fromkeys(names, power / stream if stream > 0 else 0.0)
    return shares


def _added(checkpoint: Checkpoint, imatrix: Imatrix, name: str, stream: float, *, routed: bool) -> float:
    """Mean over all tokens of the power that a branch adds to the stream; as much as is there, if nothing is known of it.

    Args:
        checkpoint: the model.
        imatrix: second moments of the inputs.
        name: of the matrix that makes what is added.
        stream: the power that is there.
        routed: whether it is an expert's, so that only some tokens get what it puts out.
    """
    if routed and imatrix.counts.get(name) == 0:
        return 0.0
    importance = imatrix.importance(name)
    if importance is None:
        return stream
    power = float(_powers(checkpoint.rows(name)) @ importance.double())
    if not routed:
        return power
    experts = checkpoint.experts
    assert experts is not None
    share = imatrix.counts[name] / max(imatrix.counts.values())
    return power * share / experts.chosen(checkpoint.config) ** 2


def _powers(matrix: Rows) -> torch.Tensor:
    """Σ w² of each column, float64."""
    power = torch.zeros(matrix.shape[1], dtype=torch.float64)
    for rows in _in_pieces(matrix):
        power += rows.square().sum(0)
    return power


def _relative_errors(
    matrix: Rows, types: tuple[BlockType, ...], importance: torch.Tensor | None, name: str
) -> dict[BlockType, float]:
    """e² of a matrix for each type."""
    width = matrix.shape[1]
    importance = torch.ones(width).double() if importance is None else importance.double()
    power_I = torch.zeros(width, dtype=torch.float64)
    noise = dict.fromkeys(types, 0.0)
    for rows in _in_pieces(matrix):
        power_I += rows.square().sum(0)
        for type in types:
            stored = torch.from_numpy(blocks.dequantize(blocks.quantize(rows, type, name=name), type, width))
            noise[type] += float(stored.sub_(rows).square_().sum(0).double() @ importance)
    power = float(power_I @ importance)
    return {type: error / power if power > 0 else 0.0 for type, error in noise.items()}


def _in_pieces(matrix: Rows) -> Iterator[torch.Tensor]:
    """float32 [rows, width]."""
    step = max(1, _ROWS_WEIGHTS // matrix.shape[1])
    for start in range(0, matrix.shape[0], step):
        yield matrix[start : start + step].float()
