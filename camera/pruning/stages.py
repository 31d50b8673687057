"""The four stages of a prune, each from folders to a folder: capture, score, prune, save.

The choice is made once. A capture that decides while it runs (sequential propagation, or a method that needs the
activations) leaves its decision in its folder, and score and prune hand it on; else prune decides from the scores.
"""

import shutil
from pathlib import Path

import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.errors import CameraError
from camera.files import atomic_file, read_json
from camera.layerwise.resume import clear_states
from camera.layerwise.statistics import read_statistics
from camera.options import CaptureOptions, PruneOptions
from camera.progress import Progress, silent
from camera.pruning.decision import (
    DECISIONS,
    KEPT,
    STATISTICS,
    Pruned,
    matrices_file,
    read_kept,
    read_scores,
    share_kept,
    write_captured,
    write_decisions,
    write_kept,
    write_matrices,
    write_scores,
    write_summary,
)
from camera.pruning.execute import decide
from camera.pruning.importance import importance, kept_channels
from camera.pruning.methods import LayerRecord
from camera.pruning.model_writer import ModelWriter, compare, feed_forward_matrices, pruned_matrix
from camera.pruning.plan import PrunePlan, plan_statistics


def capture(
    checkpoint: Checkpoint,
    tokens_ST: torch.Tensor,
    out: Path,
    options: CaptureOptions,
    plan: PrunePlan | None = None,
    progress: Progress = silent,
) -> None:
    """Write `statistics.safetensors`, `capture.json`, and what was decided into the folder `out`.

    Args:
        checkpoint: the source.
        tokens_ST: int64 [samples, tokens].
        out: an existing folder. A killed capture that left its state here goes on at the layer it was in.
        options: batch size, dtype, device, and over how many devices the samples are split.
        plan: what to decide; None, or one that decides nothing in capture, gathers statistics for every ratio and α.
        progress: told (samples done × layers, all).

    Raises:
        CameraError: as `camera.pruning.execute.decide`.
    """
    decides = plan is not None and plan.decides_in_capture
    chosen = plan if plan is not None and decides else plan_statistics(checkpoint)
    decisions = []
    for decision in decide(checkpoint, tokens_ST, chosen, options, out, progress=progress):
        write_matrices(out, decision)
        decision.matrices.clear()
        decisions.append(decision)
    write_captured(out, checkpoint, tokens_ST, options, [decision.statistics for decision in decisions])
    if decides:
        write_kept(out, [decision.kept_K for decision in decisions])
        write_decisions(out, chosen, [decision.record for decision in decisions])
    clear_states(out)


def score(
    checkpoint: Checkpoint, captured: Path, out: Path, reduce_ratio: float, progress: Progress = silent
) -> None:
    """Write `scores.safetensors` (`layers.N.importance`, float64 [F]) and `scores.json` into the folder `out`.

    What capture decided is handed on.

    Args:
        checkpoint: the model whose statistics were captured.
        captured: the folder that capture wrote.
        out: an existing folder.
        reduce_ratio: CAMERA's α.
        progress: told (layers done, all).

    Raises:
        CameraError: if the statistics are those of another model, a score is not finite, or capture decided with
            another α.
    """
    count = checkpoint.layer_count
    scores: list[torch.Tensor] = []
    for index, statistics in enumerate(read_statistics(captured / STATISTICS, count)):
        down_name = checkpoint.blocks(index)[0].down
        down_HF = checkpoint.read_finite(down_name)
        if down_HF.shape[1] != len(statistics.sum_squares_F):
            raise CameraError(
                f"{captured}: layer {index} has statistics of {len(statistics.sum_squares_F)} channels and "
                f"{down_name} has {down_HF.shape[1]}: capture again with this model"
            )
        scores_F = importance(statistics, down_HF, reduce_ratio)
        if not torch.isfinite(scores_F).all():
            raise CameraError(
                f"layer {index}: an importance is not finite; look at {down_name} for huge values"
            )
        scores.append(scores_F)
        progress(index + 1, count)
    write_scores(out, scores, reduce_ratio)
    if (captured / KEPT).is_file():
        decided = read_json(captured / DECISIONS)["reduce_ratio"]
        if decided != reduce_ratio:
            raise CameraError(
                f"{captured} chose its channels with reduce-ratio {decided}, and {reduce_ratio} is asked for: "
                "capture again with that reduce-ratio, or with propagate one-shot, which serves every one"
            )
        for name in (KEPT, DECISIONS):
            shutil.copyfile(captured / name, out / name)


def prune(
    checkpoint: Checkpoint,
    scored: Path,
    out: Path,
    plan: PrunePlan,
    options: PruneOptions,
    captured: Path | None = None,
) -> None:
    """Write `kept.safetensors` and `prune.json` into the folder `out`; no copy of what save can slice itself.

    Args:
        checkpoint: the source.
        scored: the folder that scoring wrote.
        out: an existing folder.
        plan: what is kept.
        options: what was asked for, for the summary.
        captured: the folder that capture wrote, for a method that changes matrices.

    Raises:
        CameraError: if the scores are those of another model, if capture decided something else than is asked for, or if
            that changes matrices and no captured folder has them.
    """
    if captured is None and (plan.needs_gram or plan.sparsity):
        raise CameraError(
            f"prune.method {plan.method} changes matrices: name the folder that capture wrote too"
        )
    count = checkpoint.layer_count
    scores = read_scores(scored, count)
    for index, scores_F in enumerate(scores):
        if len(scores_F) != plan.width:
            raise CameraError(
                f"{scored}: layer {index} has {len(scores_F)} scores, the model {plan.width} channels"
            )
    records: list[LayerRecord | None] = [None] * count
    if (scored / KEPT).is_file():
        kept = read_kept(scored, count)
        if any(len(kept_K) != plan.kept for kept_K in kept):
            raise CameraError(
                f"{scored}: capture kept {len(kept[0])} channels of each layer, and {plan.kept} are asked for: capture "
                "again with this ratio, or with propagate one-shot, which serves every ratio"
            )
        decided = read_json(scored / DECISIONS)
        if (decided["method"], decided["sparsity"]) != (plan.method, plan.sparsity):
            raise CameraError(
                f"{scored}: capture decided with method {decided['method']} and sparsity {decided['sparsity']:g}, and "
                f"{plan.method} and {plan.sparsity:g} are asked for: capture again with what is to be pruned"
            )
        records = [None if record is None else LayerRecord(**record) for record in decided["layers"]]
    else:
        kept = [kept_channels(scores_F, plan.kept) for scores_F in scores]
    if captured is not None:
        for layer in range(count):
            if (captured / matrices_file(layer)).is_file():
                with atomic_file(out / matrices_file(layer)) as temporary:
                    shutil.copyfile(captured / matrices_file(layer), temporary)
    write_kept(out, kept)
    shares = [share_kept(*layer) for layer in zip(scores, kept, strict=True)]
    write_summary(out, checkpoint, plan, options, shares, records)


def save(checkpoint: Checkpoint, pruned_folder: Path, out: Path, progress: Progress = silent) -> None:
    """Write the pruned model into the folder `out` in the source's own file layout.

    Tokenizer, generation config, remote code and licence are carried along. transformers builds the model from the
    saved config (on the meta device: every name and shape is checked), and every tensor is read back and compared.

    Args:
        checkpoint: the source.
        pruned_folder: what `prune` wrote.
        out: an existing folder.
        progress: told (bytes, all): once while writing, once while comparing.

    Raises:
        CameraError: if the pruned folder is of another model, or what was written does not read back as it should.
    """
    pruned = Pruned.open(pruned_folder)
    pruned.check_belongs_to(checkpoint)
    kept = pruned.kept()
    total = 2 * sum(info.size_bytes for info in checkpoint.tensors.values())
    done = 0

    def tell(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    writer = ModelWriter(checkpoint, out, pruned.width, pruned.mode, changed=pruned.changed)
    try:
        for layer, kept_K in enumerate(kept):
            writer.write(layer, kept_K, pruned.matrices(layer))
        writer.write_rest(tell)
        writer.finish()
    finally:
        writer.abandon()
    changed = feed_forward_matrices(checkpoint) if pruned.changed else {}

    def meant(name: str) -> torch.Tensor | None:
        if name not in changed:
            return None
        layer, dimension = changed[name]
        own = pruned.matrices(layer).get(name)
        return pruned_matrix(checkpoint, name, dimension, kept[layer], pruned.mode, own)

    compare(checkpoint, Checkpoint.open(out), meant, tell)
