"""One streamed pass over all decoder layers: hidden states go in, statistics of each layer come out.

In one-shot propagation a layer's output is the original model's. In sequential propagation its channels are selected
as soon as its statistics are complete, and the next layer sees what the pruned layer puts out.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.devices import dtype_name, free_memory_bytes, resolve_device, resolve_dtype
from camera.digests import digest_json
from camera.errors import CameraError
from camera.files import reserve
from camera.layerwise.collectives import Collectives
from camera.layerwise.feed_forward import FeedForwardPass
from camera.layerwise.gram import LayerGram, held_back
from camera.layerwise.resume import StateFiles, StateSaver
from camera.layerwise.runner import LayerRunner
from camera.layerwise.statistics import LayerStatistics
from camera.options import CaptureOptions, PruneOptions
from camera.progress import Progress, silent
from camera.pruning.importance import importance, kept_channels, kept_width
from camera.pruning.surgery import ROLES, Cut, CutRecord, Surgery, cut_layer, cut_plainly, make_sparse
from camera.temporaries import temporary_of

_SHARE_OF_FREE = 0.5


@dataclass(frozen=True)
class Selection:
    """What sequential propagation must know to prune a layer while it walks."""

    reduce_ratio: float
    kept: int
    widths: tuple[int, ...] = ()
    """What each layer keeps, where that is not `kept` for all."""

    def kept_in(self, layer: int) -> int:
        """How many channels of a layer stay."""
        return self.widths[layer] if self.widths else self.kept


@dataclass(frozen=True)
class Visit:
    """One decoder layer, seen."""

    layer: int
    statistics: LayerStatistics
    """Of all samples of all ranks."""
    kept_K: torch.Tensor | None
    """int64 [kept], the channels that the next layer's input was computed with; None in one-shot propagation."""
    resumed: bool
    """Whether an earlier, killed walk saw it."""
    cut: Cut | None = None
    """What a surgery decided, on the first rank; None without one, and where the visit is `resumed`."""


def selection_of(checkpoint: Checkpoint, options: CaptureOptions, prune: PruneOptions) -> Selection | None:
    """The selection that capture depends on: none in one-shot mode, whose statistics serve every ratio."""
    if options.propagate == "one-shot":
        return None
    return Selection(prune.reduce_ratio, kept_width(checkpoint.ffn_width, prune.ratio, prune.multiple_of))


def propagate(
    checkpoint: Checkpoint,
    tokens_ST: torch.Tensor,
    options: CaptureOptions,
    selection: Selection | None,
    work: Path,
    *,
    surgery: Surgery | None = None,
    ranks: Collectives | None = None,
    before_saving: Callable[[], None] = lambda: None,
    progress: Progress = silent,
) -> Iterator[Visit]:
    """Walk the layers and yield each with its statistics.

    The walk's state is saved in `work` after a layer has been yielded and dealt with, as often as costs no more
    than a few per cent of the time; a walk that finds a state of the same inputs there yields the layers it holds as
    `resumed` and goes on behind them. The last state stays: `clear_states` once what the walk was for is safe.

    Args:
        checkpoint: the model.
        tokens_ST: int64 [samples, tokens], of all ranks.
        options: batch size, dtype, device.
        selection: for sequential propagation.
        work: an existing folder for the state.
        surgery: cut every layer from its Gram matrix; in sequential propagation the next layer sees the cut one.
            What was decided for a layer is not in the walk's state: whoever asks for it keeps it.
        ranks: the processes that share the samples.
        before_saving: called before a state counts, in a thread, to make durable what was done with its layers.
        progress: told (samples done × layers, all).

    Raises:
        CameraError: for weights or activations with NaN or infinity, tokens outside the vocabulary, or windows
            longer than the model's positions.
    """
    ranks = ranks or Collectives()
    device = _device_of(options, ranks)
    dtype = resolve_dtype(options.dtype, checkpoint.dtype)
    _check_tokens(checkpoint, tokens_ST, ranks)
    mine_ST = ranks.share(tokens_ST)
    states = StateFiles(
        work, fingerprint(checkpoint, tokens_ST, dtype, selection, surgery), ranks.rank, ranks.count
    )
    held_S = ranks.share(torch.tensor(held_back(len(tokens_ST)))).tolist()
    walk = LayerRunner(checkpoint, device, dtype)
    call = walk.caller(tokens_ST.shape[1])
    count, samples = checkpoint.layer_count, len(mine_ST)
    with torch.inference_mode(), StateSaver(states, ranks, before_saving) as saving:
        layers, hidden_STH = _entering(walk, states, mine_ST, options.batch_size, work, ranks)
        for index, statistics in enumerate(layers):
            kept_K = None if surgery is not None else _select(checkpoint, index, selection, statistics)
            yield Visit(index, statistics, kept_K, resumed=True)
        for index in range(len(layers), count):
            done = index * samples

            def tell(seen: int, done: int = done) -> None:
                progress(done + seen, samples * count)

            with walk.layer(index) as module:
                visit = FeedForwardPass(module, call, hidden_STH, options.batch_size, last=index + 1 == count)
                gram = None
                if surgery is not None and surgery.needs_gram:
                    gram = LayerGram(checkpoint.ffn_width, device)
                sparse = surgery is not None and surgery.sparsity > 0
                statistics = visit.look(
                    sequential=selection is not None, hold=not sparse, tell=tell, gram=gram, held_S=held_S
                )
                ranks.merge(statistics)
                statistics.check_finite(index)
                cut = None
                matrices: dict[str, torch.Tensor] = {}
                if surgery is None:
                    kept_K = _select(checkpoint, index, selection, statistics, visit.down_HF)
                else:
                    cut = _cut(checkpoint, index, statistics, gram, visit.input_squares_H, surgery, ranks)
                    kept_K, matrices = (None, {}) if selection is None else (cut.kept_K, cut.matrices)
                gram = None  # as large as a layer or more: not kept while the caller writes
                if kept_K is not None:
                    visit.narrow(kept_K, matrices)
            layers.append(statistics)
            yield Visit(index, statistics, kept_K, resumed=False, cut=cut)
            if index + 1 < count:
                saving.save_if_due(layers, hidden_STH)
    ranks.barrier()
    progress(samples * count, samples * count)


def _entering(
    walk: LayerRunner,
    states: StateFiles,
    mine_ST: torch.Tensor,
    batch_size: int,
    work: Path,
    ranks: Collectives,
) -> tuple[list[LayerStatistics], torch.Tensor]:
    """Statistics of the layers that an earlier walk saw, and the hidden states that enter the next one."""
    state = states.newest()
    if not ranks.all_equal(0 if state is None else len(state.layers)):
        state = None
    hidden_STH = _room((*mine_ST.shape, walk.checkpoint.hidden_size), walk.dtype, walk.device, work, ranks)
    if state is not None:
        hidden_STH.copy_(state.hidden_STH)
        return state.layers, hidden_STH
    for start in range(0, len(mine_ST), batch_size):
        batch = slice(start, start + batch_size)
        hidden_STH[batch] = walk.embed(mine_ST[batch]).to(hidden_STH.device)
    return [], hidden_STH


def _select(
    checkpoint: Checkpoint,
    index: int,
    selection: Selection | None,
    statistics: LayerStatistics,
    down_HF: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """The channels of one layer that stay, int64 [kept] on the CPU; None in one-shot propagation.

    Scored with the checkpoint's own matrix: bit for bit the scores that prune will use, though the layer
    computes in another dtype, or on a device without float64. Where the layer's matrix at hand is that very one it
    is used; reading it again would map it twice.
    """
    if selection is None:
        return None
    name = checkpoint.family.ffn_names(index)[2]
    if down_HF is None or down_HF.device.type != "cpu" or down_HF.dtype != checkpoint.tensors[name].dtype:
        down_HF = checkpoint.read(name)
    scores_F = importance(statistics, down_HF, selection.reduce_ratio)
    return kept_channels(scores_F, selection.kept_in(index))


def _cut(
    checkpoint: Checkpoint,
    index: int,
    statistics: LayerStatistics,
    gram: LayerGram | None,
    input_squares_H: torch.Tensor,
    surgery: Surgery,
    ranks: Collectives,
) -> Cut:
    """Decide on the first rank, and hand out what the others need to go on."""
    surgery = surgery.of_layer(index)
    names = dict(zip(ROLES, checkpoint.family.ffn_names(index), strict=True))
    down_HF = checkpoint.read(names["down"])
    if (
        gram is None or surgery.kept == down_HF.shape[1]
    ):  # nothing goes, so that there is nothing to make good
        cut = cut_plainly(statistics, down_HF, surgery)
    else:
        gram.merge(ranks)
        cut = _handed_out(index, statistics, gram, down_HF, surgery, ranks)
    if not surgery.sparsity:
        return cut
    ranks.all_reduce(input_squares_H)
    own = {role: checkpoint.read(name) for role, name in names.items()}
    return make_sparse(cut, statistics, input_squares_H, own, surgery)


def _handed_out(
    index: int,
    statistics: LayerStatistics,
    gram: LayerGram,
    down_HF: torch.Tensor,
    surgery: Surgery,
    ranks: Collectives,
) -> Cut:
    """The cut of the first rank, on every rank; the record is complete on the first alone."""
    if ranks.first:
        cut = cut_layer(index, statistics, gram, down_HF, surgery)
    else:
        nothing = CutRecord(surgery.score, False, None, gram.fit_tokens, gram.held_tokens, None, None)
        cut = Cut(torch.empty(surgery.kept, dtype=torch.int64), {}, nothing)
    ranks.broadcast(cut.kept_K)
    if ranks.broadcast_int(len(cut.matrices)):
        down_HK = cut.matrices.get("down")
        if down_HK is None:
            down_HK = torch.empty(len(down_HF), surgery.kept, dtype=down_HF.dtype)
        ranks.broadcast(down_HK)
        cut = replace(cut, matrices={"down": down_HK})
    return cut


def _room(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, work: Path, ranks: Collectives
) -> torch.Tensor:
    """Room for hidden states where they fit: on the device, else in the host's memory, else in a mapped file."""
    size = prod(shape) * dtype.itemsize
    if device.type != "cpu" and size <= _SHARE_OF_FREE * free_memory_bytes(device):
        return torch.empty(shape, dtype=dtype, device=device)
    if ranks.count * size <= _SHARE_OF_FREE * free_memory_bytes(torch.device("cpu")):  # ranks share the host
        return torch.empty(shape, dtype=dtype)
    path = temporary_of(work / "hidden")
    with path.open("wb") as file:  # a full disk is an error here; through the map it would be a SIGBUS
        reserve(file.fileno(), size)
    mapped = torch.from_file(str(path), shared=True, size=prod(shape), dtype=dtype)
    path.unlink()  # the map keeps the file; its name is not needed again, and a kill leaves nothing behind
    return mapped.view(shape)


def _device_of(options: CaptureOptions, ranks: Collectives) -> torch.device:
    """Each rank takes an accelerator of its own; on the CPU they share the cores."""
    device = resolve_device(options.device)
    if device.type == "cpu" or ranks.count == 1:
        return device
    return resolve_device(f"{device.type}:{ranks.rank}")


def _check_tokens(checkpoint: Checkpoint, tokens_ST: torch.Tensor, ranks: Collectives) -> None:
    length = tokens_ST.shape[1]
    positions = int(checkpoint.config.get("max_position_embeddings", length))
    if length > positions:
        raise CameraError(
            f"calibration windows of {length} tokens exceed the model's {positions} positions: lower the length"
        )
    if len(tokens_ST) < ranks.count:
        raise CameraError(f"{len(tokens_ST)} samples cannot be split over {ranks.count} devices: use fewer")


def fingerprint(
    checkpoint: Checkpoint,
    tokens_ST: torch.Tensor,
    dtype: torch.dtype,
    selection: Selection | None,
    surgery: Surgery | None = None,
) -> str:
    """What an unfinished walk belongs to. The weights stand by name, shape and file time: hashing them takes minutes."""
    return digest_json(
        {
            "config": checkpoint.config,
            "folder": str(checkpoint.folder.resolve()),
            "tensors": {name: list(info.shape) for name, info in checkpoint.tensors.items()},
            "changed": [(checkpoint.folder / file).stat().st_mtime_ns for file in checkpoint.weight_files],
            "shape": list(tokens_ST.shape),
            "tokens": digest_json(tokens_ST.flatten().tolist()),
            "dtype": dtype_name(dtype),
            "selection": None if selection is None else _said(selection),
            **({} if surgery is None else {"surgery": _said(surgery)}),
        }
    )


def _said(given: Selection | Surgery) -> dict[str, Any]:
    """As it is, without widths by layer where there are none."""
    return {name: value for name, value in asdict(given).items() if name != "widths" or value}
