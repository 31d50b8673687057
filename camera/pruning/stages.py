"""The four stages of a prune, each from folders to a folder: capture, score, prune, save.

The choice is made once. A capture that decides while it runs (sequential propagation, or a method that needs the
activations) leaves its decision in its folder, and score and prune hand it on; else prune decides from the scores.
"""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import read_tensors
from camera.errors import CameraError
from camera.files import atomic_file, read_json
from camera.layerwise.parts import Parts
from camera.layerwise.resume import clear_states
from camera.layerwise.statistics import BlockStatistics, read_statistics
from camera.models import Block
from camera.options import CaptureOptions, PruneOptions
from camera.progress import Progress, silent
from camera.pruning.decision import Records, Stays, records_of, routed_from
from camera.pruning.execute import decide
from camera.pruning.folders import (
    DECISIONS,
    KEPT,
    STATISTICS,
    Scored,
    matrices_file,
    read_kept,
    read_records,
    write_captured,
    write_decisions,
    write_kept,
    write_matrices,
)
from camera.pruning.importance import (
    block_importance,
    joint_channels,
    kept_channels,
    too_few,
)
from camera.pruning.model_writer import ModelWriter, changing_tensors, compare, pruned_tensor
from camera.pruning.plan import PrunePlan, Split, plan_statistics
from camera.pruning.split import SPLIT, split_by_pass
from camera.pruning.summary import Pruned, write_summary


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
    parts = Parts(out)
    if not parts.are_whole():  # or none of them is used
        clear_states(out)
        for path in (out / SPLIT, *out.glob(matrices_file("*"))):
            path.unlink(missing_ok=True)
        parts.begin()
    chosen = split_by_pass(checkpoint, tokens_ST, chosen, options, out, progress)
    if (out / SPLIT).is_file():
        parts.add(SPLIT)
    decisions = []
    for decision in decide(checkpoint, tokens_ST, chosen, options, out, progress=progress):
        write_matrices(out, decision)
        if decision.matrices:
            parts.add(matrices_file(decision.layer))
        decisions.append(decision.without_matrices())
    write_captured(out, checkpoint, tokens_ST, options, decisions)
    if decides:
        write_kept(out, [decision.stays() for decision in decisions])
        write_decisions(out, chosen, records_of(decisions))
    clear_states(out)
    parts.forget()
    (out / SPLIT).unlink(missing_ok=True)


def score(
    checkpoint: Checkpoint, captured: Path, out: Path, reduce_ratio: float, progress: Progress = silent
) -> None:
    """Write `scores.safetensors` (`layers.N.importance` of every block, float64 [F]) and `scores.json` into the folder `out`.

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
    statistics = read_statistics(captured / STATISTICS, count)
    scores: list[dict[str, torch.Tensor]] = []
    for layer, found in enumerate(statistics):
        blocks = {block.label: block for block in checkpoint.blocks(layer)}
        if not found.keys() <= blocks.keys():
            raise CameraError(
                f"{captured}: layer {layer} has other blocks than this model: capture again with it"
            )
        scores.append({})
        for label, of_block in found.items():
            scores[-1][label] = _importance(checkpoint, captured, blocks[label], of_block, reduce_ratio)
        progress(layer + 1, count)
    routed = routed_from(read_tensors(captured / STATISTICS), count)
    Scored(scores, routed, [too_few(found) for found in statistics]).write(out, reduce_ratio)
    if (captured / KEPT).is_file():
        decided = read_json(captured / DECISIONS)["reduce_ratio"]
        if decided != reduce_ratio:
            raise CameraError(
                f"{captured} chose its channels with reduce-ratio {decided}, and {reduce_ratio} is asked for: "
                "capture again with that reduce-ratio, or with propagate one-shot, which serves every one"
            )
        for name in (KEPT, DECISIONS):
            shutil.copyfile(captured / name, out / name)


def _importance(
    checkpoint: Checkpoint, captured: Path, block: Block, found: BlockStatistics, reduce_ratio: float
) -> torch.Tensor:
    width = checkpoint.tensors[block.down].shape[1] if block.down in checkpoint.tensors else 0
    if width != len(found.sum_squares_F):
        raise CameraError(
            f"{captured} has statistics of {len(found.sum_squares_F)} channels and {block.down} has {width}: "
            "capture again with this model"
        )
    scores_F = block_importance(checkpoint, block, found, reduce_ratio)
    if not torch.isfinite(scores_F).all():
        raise CameraError(f"an importance is not finite; look at {block.down} for huge values")
    return scores_F


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
    scored_layers = Scored.read(scored, count)
    if plan.candidates and (scored / DECISIONS).is_file():
        plan = plan.with_split([Split(*each) for each in read_json(scored / DECISIONS)["considered"]])
    for layer, scores in enumerate(scored_layers.layers):
        widths = {block.label: block.width(checkpoint.config) for block in checkpoint.blocks(layer)}
        for label, scores_F in scores.items():
            if len(scores_F) != widths.get(label):
                raise CameraError(
                    f"{scored}: layer {layer} has {len(scores_F)} scores, the model {widths.get(label, 0)} channels"
                )
    records: Records = [{} for _ in range(count)]
    if (scored / KEPT).is_file():
        decided = read_json(scored / DECISIONS)
        _check_decided(scored, decided, plan)
        layers = read_kept(scored, count)
        records = read_records(decided["layers"], count)
    elif plan.drops or plan.candidates:
        raise CameraError(
            f"{scored}: experts are dropped while capture runs, and this one was not told to: capture again with experts"
        )
    else:
        layers = [_stays(checkpoint, layer, scored_layers, plan) for layer in range(count)]
    if captured is not None:
        for layer in range(count):
            if (captured / matrices_file(layer)).is_file():
                with atomic_file(out / matrices_file(layer)) as temporary:
                    shutil.copyfile(captured / matrices_file(layer), temporary)
    write_kept(out, layers)
    write_summary(out, checkpoint, plan, options, scored_layers, (layers, records))


def _check_decided(scored: Path, decided: Mapping[str, Any], plan: PrunePlan) -> None:
    """Raise CameraError if capture decided something else than is asked for."""
    if (decided["kept"], decided["experts_kept"]) != (plan.kept, plan.experts_kept):
        experts = f" and {decided['experts_kept']} experts" if plan.experts else ""
        asked = f" and {plan.experts_kept}" if plan.experts else ""
        raise CameraError(
            f"{scored}: capture kept {decided['kept']} channels{experts} of each layer, and {plan.kept}{asked} are asked "
            "for: capture again with this ratio, or with propagate one-shot, which serves every ratio"
        )
    if (decided["method"], decided["sparsity"]) != (plan.method, plan.sparsity):
        raise CameraError(
            f"{scored}: capture decided with method {decided['method']} and sparsity {decided['sparsity']:g}, and "
            f"{plan.method} and {plan.sparsity:g} are asked for: capture again with what is to be pruned"
        )


def _stays(checkpoint: Checkpoint, layer: int, scored: Scored, plan: PrunePlan) -> Stays:
    """What stays of a layer by its scores alone."""
    scores, routed = scored.layers[layer], scored.routed[layer]
    kept_E = None if routed is None else routed.kept_E
    counts = {
        block.label: plan.kept_of(block, len(scores[block.label])) for block in checkpoint.blocks(layer)
    }
    if plan.scope == "layer":
        return Stays(joint_channels(scores, sum(counts.values())), kept_E)
    return Stays({label: kept_channels(scores[label], count) for label, count in counts.items()}, kept_E)


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
    layers = pruned.stays()
    total = 2 * sum(info.size_bytes for info in checkpoint.tensors.values())
    done = 0

    def tell(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    writer = ModelWriter(checkpoint, out, pruned.mode, pruned.config_changes, changed=pruned.changed)
    try:
        for layer, stays in enumerate(layers):
            writer.write(layer, replace(stays, matrices=pruned.matrices(layer)))
        writer.write_rest(tell)
        writer.finish()
    finally:
        writer.abandon()
    places = changing_tensors(checkpoint, pruned.config_changes) if pruned.changed else {}

    def meant(name: str) -> torch.Tensor | None:
        place = places.get(name)
        if place is None:
            return None
        stays = replace(layers[place.layer], matrices=pruned.matrices(place.layer))
        return pruned_tensor(checkpoint, place, stays, pruned.mode)

    compare(checkpoint, Checkpoint.open(out), meant, tell)
    progress(total, total)
