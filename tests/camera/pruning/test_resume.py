"""A killed capture or prune goes on where it was, and ends with the bytes of an undisturbed run."""

from pathlib import Path
from typing import Any

import pytest
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import write_tensors
from camera.layerwise import resume as saving
from camera.options import CaptureOptions
from camera.progress import Progress, silent
from camera.pruning.capture import STATISTICS, capture
from camera.pruning.propagate import selection_of
from camera.pruning.prune import prune
from tests.camera.pruning.conftest import (
    PROPAGATIONS,
    PRUNE,
    Build,
    KilledError,
    contents,
    kill_at,
    run_steps,
)


def state_after(layers: int) -> str:
    return f"resume-{layers:04d}-0of1.safetensors"


@pytest.fixture(autouse=True)
def _save_after_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "_SHARE", 1e9)


def run_capture(
    folder: Path, tokens_ST: torch.Tensor, out: Path, propagate: str, progress: Progress = silent
) -> None:
    out.mkdir(exist_ok=True)
    checkpoint = Checkpoint.open(folder)
    options = CaptureOptions(propagate=propagate, device="cpu", batch_size=2)  # type: ignore[arg-type]
    selection = selection_of(checkpoint, options, PRUNE)
    capture(checkpoint, tokens_ST, out, options, selection, progress)


@pytest.mark.parametrize("propagate", PROPAGATIONS)
@pytest.mark.parametrize("killed_in", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_killed_capture_goes_on_at_the_layer_it_was_in(
    build: Build,
    tokens: torch.Tensor,
    tmp_path: Path,
    read_names: list[str],
    propagate: str,
    killed_in: int,
    dtype: torch.dtype,
) -> None:
    folder = build(model_type="PanguEmbedded", dtype=dtype)
    run_capture(folder, tokens, tmp_path / "undisturbed", propagate)
    assert set(contents(tmp_path / "undisturbed")) == {STATISTICS, "capture.json"}
    with pytest.raises(KilledError):
        run_capture(folder, tokens, tmp_path / "killed", propagate, kill_at(killed_in * len(tokens) + 3))
    assert set(contents(tmp_path / "killed")) == {state_after(killed_in)}

    read_names.clear()
    told: list[int] = []
    run_capture(folder, tokens, tmp_path / "killed", propagate, lambda done, total: told.append(done))
    assert min(told) > killed_in * len(tokens)
    assert read_names
    assert not [name for name in read_names for layer in range(killed_in) if f"layers.{layer}." in name]
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")


def test_a_capture_killed_again_and_again_still_ends_the_same(
    build: Build, tokens: torch.Tensor, tmp_path: Path
) -> None:
    folder = build(model_type="llama")
    run_capture(folder, tokens, tmp_path / "undisturbed", "sequential")
    for limit in (2, 7, 12):
        with pytest.raises(KilledError):
            run_capture(folder, tokens, tmp_path / "killed", "sequential", kill_at(limit))
    run_capture(folder, tokens, tmp_path / "killed", "sequential")
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "no hidden states", "a layer short"])
def test_a_damaged_resume_file_is_ignored(
    build: Build, tokens: torch.Tensor, tmp_path: Path, damage: str
) -> None:
    folder = build(model_type="llama")
    run_capture(folder, tokens, tmp_path / "undisturbed", "sequential")
    with pytest.raises(KilledError):
        run_capture(folder, tokens, tmp_path / "killed", "sequential", kill_at(8))
    state = tmp_path / "killed" / state_after(1)
    whole = state.read_bytes()
    if damage == "truncated":
        state.write_bytes(whole[: len(whole) // 2])
    elif damage == "garbage":
        state.write_bytes(b"\xff" * 500)
    elif damage == "empty":
        state.write_bytes(b"")
    elif damage == "no hidden states":
        write_tensors(state, {"layers.0.sum_squares": torch.ones(192), "layers.0.max_abs": torch.ones(192)})
    else:
        write_tensors(state, {"layers.1.sum_squares": torch.ones(192), "layers.1.max_abs": torch.ones(192),
                              "hidden": torch.ones(5, 24, 64)})  # fmt: skip
    run_capture(folder, tokens, tmp_path / "killed", "sequential")
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")


def test_after_the_first_layer_saving_takes_no_more_than_its_share(
    build: Build, tokens: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "_SHARE", 0.0)
    checkpoint = Checkpoint.open(build(model_type="llama"))
    options = CaptureOptions(propagate="one-shot", device="cpu")
    with pytest.raises(KilledError):
        capture(checkpoint, tokens, tmp_path, options, progress=kill_at(12))
    assert set(contents(tmp_path)) == {state_after(1)}


def test_a_state_of_other_inputs_is_ignored(build: Build, tokens: torch.Tensor, tmp_path: Path) -> None:
    folder = build(model_type="llama")
    run_capture(folder, tokens, tmp_path / "undisturbed", "sequential")
    with pytest.raises(KilledError):
        run_capture(folder, tokens.flip(0), tmp_path / "killed", "sequential", kill_at(8))
    run_capture(folder, tokens, tmp_path / "killed", "sequential")
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("mode", ["physical", "mask"])
def test_a_killed_prune_goes_on_at_the_first_layer_that_is_not_there(
    build: Build, tokens: torch.Tensor, tmp_path: Path, read_names: list[str], mode: str
) -> None:
    folder = build(model_type="qwen3", ffn=172, shards=3)
    options = PRUNE.model_copy(update={"mode": mode})
    steps = run_steps(folder, tokens, tmp_path / "undisturbed", options)
    checkpoint = Checkpoint.open(folder)
    out = tmp_path / "killed"
    out.mkdir()
    with pytest.raises(KilledError):
        prune(checkpoint, steps.scored, out, options, kill_at(2))
    decided = {"kept.safetensors", "prune.json"}
    assert set(contents(out)) == decided | {"layer-0000.safetensors", "layer-0001.safetensors"}

    read_names.clear()
    prune(checkpoint, steps.scored, out, options)
    assert set(read_names) == set(checkpoint.family.ffn_names(2))
    assert contents(out) == contents(steps.pruned)


@pytest.mark.parametrize("change", [{"ratio": 0.5}, {"mode": "mask"}])
def test_matrices_that_another_prune_left_are_dropped(
    build: Build, tokens: torch.Tensor, tmp_path: Path, change: dict[str, Any]
) -> None:
    folder = build(model_type="llama")
    first = run_steps(folder, tokens, tmp_path / "first", propagate="one-shot")
    changed = PRUNE.model_copy(update=change)
    wanted = run_steps(folder, tokens, tmp_path / "wanted", changed, propagate="one-shot")
    with pytest.raises(KilledError):
        prune(Checkpoint.open(folder), first.scored, tmp_path / "first" / "pruned", changed, kill_at(1))
    prune(Checkpoint.open(folder), first.scored, tmp_path / "first" / "pruned", changed)
    assert contents(tmp_path / "first" / "pruned") == contents(wanted.pruned)


def test_matrices_of_an_unfinished_prune_of_other_scores_are_dropped(
    build: Build, tokens: torch.Tensor, tmp_path: Path
) -> None:
    folder = build(model_type="llama")
    first = run_steps(folder, tokens, tmp_path / "first")
    second = run_steps(folder, tokens.flip(1), tmp_path / "second")
    with pytest.raises(KilledError):
        prune(Checkpoint.open(folder), first.scored, tmp_path / "first" / "pruned", PRUNE, kill_at(2))
    prune(Checkpoint.open(folder), second.scored, tmp_path / "first" / "pruned", PRUNE)
    assert contents(tmp_path / "first" / "pruned") == contents(second.pruned)
