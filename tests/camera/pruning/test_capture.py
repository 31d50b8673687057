import json
from pathlib import Path
from typing import Any

import pytest
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import read_tensors, write_tensors
from camera.checkpoints.weights import SINGLE_NAME
from camera.errors import CameraError
from camera.layerwise import feed_forward as visitor
from camera.layerwise.statistics import BlockStatistics, read_statistics
from camera.options import CaptureOptions, PruneOptions
from camera.pruning.folders import STATISTICS, read_kept
from camera.pruning.importance import importance, kept_channels
from camera.pruning.plan import kept_width, plan_prune
from camera.pruning.stages import capture
from tests.camera.pruning import naive
from tests.camera.pruning.conftest import (
    KINDS,
    ONE_OF_EACH_FAMILY,
    PROPAGATIONS,
    PRUNE,
    Build,
    change_tensors,
    contents,
    only,
)
from tests.tiny import tiny_checkpoint


def captured(
    folder: Path, tokens_ST: torch.Tensor, out: Path, prune: PruneOptions = PRUNE, **changes: Any
) -> list[BlockStatistics]:
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = Checkpoint.open(folder)
    options = CaptureOptions(**{"device": "cpu", "batch_size": 2, **changes})
    capture(checkpoint, tokens_ST, out, options, plan_prune(checkpoint, options, prune))
    return only(read_statistics(out / STATISTICS, checkpoint.layer_count))


def kept_by(
    folder: Path, layers: list[BlockStatistics], alpha: float = PRUNE.reduce_ratio
) -> list[list[int]]:
    checkpoint = Checkpoint.open(folder)
    count = kept_width(checkpoint.ffn_width, PRUNE.ratio, PRUNE.multiple_of)
    return [
        kept_channels(
            importance(layer, checkpoint.read(checkpoint.ffn_names(index)[2]), alpha), count
        ).tolist()
        for index, layer in enumerate(layers)
    ]


def close(found: BlockStatistics, expected: BlockStatistics, rtol: float = 1e-4) -> None:
    torch.testing.assert_close(found.sum_squares_F, expected.sum_squares_F, rtol=rtol, atol=1e-10)
    torch.testing.assert_close(found.max_abs_F, expected.max_abs_F, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("propagate", PROPAGATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_streaming_sees_what_hooks_on_the_whole_model_see(
    build: Build, tokens: torch.Tensor, tmp_path: Path, kind: str, propagate: str
) -> None:
    folder = build(**KINDS[kind])
    found = captured(folder, tokens, tmp_path, propagate=propagate)
    count = kept_width(Checkpoint.open(folder).ffn_width, PRUNE.ratio, PRUNE.multiple_of)
    exact: list[BlockStatistics] = []

    def see(layer: int, act_NF: torch.Tensor) -> None:
        exact.append(BlockStatistics(act_NF.square().sum(0), act_NF.abs().amax(0).float()))

    model = Checkpoint.open(folder).load_model()
    kept = naive.prune_model(model, tokens, PRUNE.reduce_ratio, count, propagate, see)
    for layer, expected in zip(found, exact, strict=True):
        close(layer, expected)
    assert kept_by(folder, found) == kept


def test_the_two_propagations_differ_from_the_second_layer_on(
    build: Build, tokens: torch.Tensor, tmp_path: Path
) -> None:
    folder = build(model_type="llama")
    once = captured(folder, tokens, tmp_path / "once", propagate="one-shot")
    layered = captured(folder, tokens, tmp_path / "layered", propagate="sequential")
    close(layered[0], once[0], rtol=1e-6)
    for layer in (1, 2):
        assert not torch.allclose(once[layer].sum_squares_F, layered[layer].sum_squares_F, rtol=1e-3)


def test_one_shot_statistics_serve_every_ratio(build: Build) -> None:
    checkpoint = Checkpoint.open(build(model_type="llama"))
    assert not plan_prune(checkpoint, CaptureOptions(propagate="one-shot"), PRUNE).decides_in_capture
    plan = plan_prune(checkpoint, CaptureOptions(propagate="sequential"), PRUNE)
    assert plan.decides_in_capture
    assert (plan.reduce_ratio, plan.kept) == (0.6, 136)


@pytest.mark.parametrize("propagate", PROPAGATIONS)
def test_the_batch_size_changes_neither_statistics_nor_choice(
    build: Build, tokens: torch.Tensor, tmp_path: Path, propagate: str
) -> None:
    folder = build(**KINDS["PanguEmbedded, 172 channels, 3 shards"])
    runs = {
        size: captured(folder, tokens, tmp_path / str(size), propagate=propagate, batch_size=size)
        for size in (1, 2, 3, 5, 64)
    }
    for layers in runs.values():
        for layer, reference in zip(layers, runs[1], strict=True):
            close(layer, reference, rtol=1e-5)
        assert kept_by(folder, layers) == kept_by(folder, runs[1])


@pytest.mark.parametrize("propagate", PROPAGATIONS)
@pytest.mark.parametrize("shape", [(1, 24), (1, 1), (3, 1)])
def test_one_sample_and_one_token_are_enough(
    build: Build, tokens: torch.Tensor, tmp_path: Path, shape: tuple[int, int], propagate: str
) -> None:
    folder = build(model_type="qwen3")
    few = tokens[: shape[0], : shape[1]]
    found = captured(folder, few, tmp_path, propagate=propagate)
    close(found[0], from_hooks(folder, few, 0))
    if propagate == "one-shot":
        close(found[2], from_hooks(folder, few, 2))


def from_hooks(folder: Path, tokens_ST: torch.Tensor, layer: int) -> BlockStatistics:
    act_NF = naive.activations(Checkpoint.open(folder).load_model(), tokens_ST, layer)
    return BlockStatistics(act_NF.square().sum(0), act_NF.abs().amax(0).float())


@pytest.mark.parametrize("kind", ONE_OF_EACH_FAMILY)
@pytest.mark.parametrize("held_batches", [0, 1, 2])
def test_sequential_capture_needs_no_room_for_activations(
    build: Build,
    tokens: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    held_batches: int,
) -> None:
    folder = build(**KINDS[kind])
    with_room = captured(folder, tokens, tmp_path / "room", propagate="sequential")
    batch_bytes = 2 * tokens.shape[1] * Checkpoint.open(folder).ffn_width * 4
    monkeypatch.setattr(visitor, "ACTIVATION_BUDGET_BYTES", held_batches * batch_bytes)
    without = captured(folder, tokens, tmp_path / "none", propagate="sequential")
    for layer, reference in zip(without, with_room, strict=True):
        close(layer, reference, rtol=1e-5)
    assert kept_by(folder, without) == kept_by(folder, with_room)


def test_sequential_capture_at_ratio_zero_is_one_shot(
    build: Build, tokens: torch.Tensor, tmp_path: Path
) -> None:
    folder = build(model_type="qwen2", tied=True)
    none = PRUNE.model_copy(update={"ratio": 0.0})
    sequential = captured(folder, tokens, tmp_path / "a", prune=none, propagate="sequential")
    once = captured(folder, tokens, tmp_path / "b", propagate="one-shot")
    for layer, reference in zip(sequential, once, strict=True):
        close(layer, reference, rtol=1e-5)


def test_what_capture_decides_in_bfloat16_is_scored_with_the_checkpoints_own_matrices(
    build: Build, tokens: torch.Tensor, tmp_path: Path
) -> None:
    folder = build(
        model_type="llama", ffn=1024
    )  # many channels: bfloat16 weights would rank some differently
    layers = captured(folder, tokens, tmp_path, propagate="sequential", dtype="bfloat16")
    assert [stays.kept[""].tolist() for stays in read_kept(tmp_path, 3)] == [
        kept_channels(
            importance(layer, Checkpoint.open(folder).read(name), PRUNE.reduce_ratio),
            kept_width(1024, PRUNE.ratio, PRUNE.multiple_of),
        ).tolist()
        for layer, name in zip(
            layers, (f"model.layers.{index}.mlp.down_proj.weight" for index in range(3)), strict=True
        )
    ]


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_a_half_precision_checkpoint_is_computed_in_its_own_dtype_and_summed_in_more(
    tokens: torch.Tensor, tmp_path: Path, name: str
) -> None:
    folder = tiny_checkpoint(tmp_path / "model", layers=2, dtype=getattr(torch, name))
    found = captured(folder, tokens, tmp_path / "out", propagate="one-shot")
    assert json.loads((tmp_path / "out" / "capture.json").read_text())["dtype"] == name
    model = Checkpoint.open(folder).load_model()
    assert model.dtype == getattr(torch, name)
    for index, layer in enumerate(found):
        act_NF = naive.activations(model, tokens, index)
        # Kernels may round differently for another batch; what they gave is summed without further loss.
        close(layer, BlockStatistics(act_NF.square().sum(0), act_NF.abs().amax(0).float()), rtol=0.03)


def test_the_summary_says_what_was_captured(build: Build, tokens: torch.Tensor, tmp_path: Path) -> None:
    captured(build(model_type="llama"), tokens, tmp_path, propagate="sequential")
    assert json.loads((tmp_path / "capture.json").read_text()) == {
        "samples": 5,
        "length": 24,
        "tokens": 120,
        "layers": 3,
        "ffn_width": 192,
        "propagate": "sequential",
        "dtype": "float32",
        "device": "cpu",
    }


@pytest.mark.parametrize("propagate", PROPAGATIONS)
def test_the_same_capture_gives_the_same_bytes(
    build: Build, tokens: torch.Tensor, tmp_path: Path, propagate: str
) -> None:
    folder = build(**KINDS["PanguEmbedded"])
    captured(folder, tokens, tmp_path / "a", propagate=propagate)
    captured(folder, tokens, tmp_path / "b", propagate=propagate)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_progress_rises_to_its_end(build: Build, tokens: torch.Tensor, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    capture(
        Checkpoint.open(build(model_type="llama")),
        tokens,
        tmp_path,
        CaptureOptions(propagate="one-shot", device="cpu", batch_size=2),
        progress=lambda done, total: told.append((done, total)),
    )
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (15, 15)
    assert {total for _, total in told} == {15}


# What it refuses


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"]
)
def test_a_weight_that_is_not_finite_is_named(
    tokens: torch.Tensor, tmp_path: Path, name: str, bad: float
) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    damaged = read_tensors(folder / SINGLE_NAME)[name].clone()
    damaged[3, 5] = bad
    with pytest.raises(CameraError, match=f"{name} holds NaN or infinity"):
        captured(change_tensors(folder, {name: damaged}), tokens, tmp_path / "out")


def test_an_embedding_row_in_use_that_is_not_finite_is_refused(tokens: torch.Tensor, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    name = "model.embed_tokens.weight"
    damaged = read_tensors(folder / SINGLE_NAME)[name].clone()
    damaged[int(tokens[0, 0])] = float("nan")
    with pytest.raises(CameraError, match=f"{name} holds NaN or infinity"):
        captured(change_tensors(folder, {name: damaged}), tokens, tmp_path / "out")


@pytest.mark.parametrize("propagate", PROPAGATIONS)
def test_activations_that_overflow_are_refused_with_their_layer(
    tokens: torch.Tensor, tmp_path: Path, propagate: str
) -> None:
    folder = tiny_checkpoint(tmp_path / "model", layers=3)
    name = "model.layers.1.mlp.up_proj.weight"
    huge = read_tensors(folder / SINGLE_NAME)[name] * 5e4  # fits float16; what it multiplies does not
    with pytest.raises(CameraError, match=r"decoder layer 1 hold NaN or infinity.*capture\.dtype"):
        captured(
            change_tensors(folder, {name: huge}),
            tokens,
            tmp_path / "out",
            propagate=propagate,
            dtype="float16",
        )
    captured(folder, tokens, tmp_path / "mended", propagate=propagate, dtype="float32")


@pytest.mark.parametrize("token", [352, 99_999, -1])
def test_a_token_that_the_embedding_lacks_is_named(
    build: Build, tokens: torch.Tensor, tmp_path: Path, token: int
) -> None:
    tokens[2, 3] = token
    with pytest.raises(CameraError, match=f"token {token} is outside the embedding's 352 rows"):
        captured(build(model_type="llama"), tokens, tmp_path)


def test_windows_longer_than_the_positions_of_the_model_are_refused(build: Build, tmp_path: Path) -> None:
    with pytest.raises(CameraError, match="windows of 513 tokens exceed the model's 512 positions"):
        captured(build(model_type="llama"), torch.zeros(1, 513, dtype=torch.int64), tmp_path)


def test_a_layer_that_lacks_a_weight_is_named(tokens: torch.Tensor, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    tensors = {name: value.clone() for name, value in read_tensors(folder / SINGLE_NAME).items()}
    del tensors["model.layers.1.mlp.down_proj.weight"]
    write_tensors(folder / SINGLE_NAME, tensors)
    with pytest.raises(CameraError, match=r"decoder layer 1 does not load[\s\S]*down_proj"):
        captured(folder, tokens, tmp_path / "out", propagate="one-shot")


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
        ("gemma3_text", {}),
        ("granite", {}),
    ],
)
def test_windows_norms_behind_and_multipliers_are_the_model_s_in_sequential_propagation_too(
    tokens: torch.Tensor, tmp_path: Path, model_type: str, options: dict[str, Any]
) -> None:
    folder = tiny_checkpoint(tmp_path / "model", model_type, **options)
    found = captured(folder, tokens, tmp_path / "out", propagate="sequential")
    count = kept_width(Checkpoint.open(folder).ffn_width, PRUNE.ratio, PRUNE.multiple_of)
    exact: list[BlockStatistics] = []

    def see(layer: int, act_NF: torch.Tensor) -> None:
        exact.append(BlockStatistics(act_NF.square().sum(0), act_NF.abs().amax(0).float()))

    model = Checkpoint.open(folder).load_model()
    naive.prune_model(model, tokens, PRUNE.reduce_ratio, count, "sequential", see)
    for layer, expected in zip(found, exact, strict=True):
        close(layer, expected)
