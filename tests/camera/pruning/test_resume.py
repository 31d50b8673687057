"""A killed capture goes on where it was, and ends with the bytes of an undisturbed run."""

from pathlib import Path

import pytest
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import write_tensors
from camera.layerwise import resume as saving
from camera.options import CaptureOptions
from camera.progress import Progress, silent
from camera.pruning.folders import DECISIONS, KEPT, STATISTICS
from camera.pruning.plan import plan_prune
from camera.pruning.stages import capture
from tests.camera.pruning.conftest import (
    PROPAGATIONS,
    PRUNE,
    Build,
    KilledError,
    contents,
    kill_at,
)


def state_after(layers: int) -> str:
    return f"resume-{layers:04d}-0of1.safetensors"


@pytest.fixture(autouse=True)
def _save_after_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "RULE", saving.SaveRule(0, 1e9))


def run_capture(
    folder: Path, tokens_ST: torch.Tensor, out: Path, propagate: str, progress: Progress = silent
) -> None:
    out.mkdir(exist_ok=True)
    checkpoint = Checkpoint.open(folder)
    options = CaptureOptions(propagate=propagate, device="cpu", batch_size=2)  # type: ignore[arg-type]
    capture(checkpoint, tokens_ST, out, options, plan_prune(checkpoint, options, PRUNE), progress)


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
    decided = {KEPT, DECISIONS} if propagate == "sequential" else set()
    assert set(contents(tmp_path / "undisturbed")) == {STATISTICS, "capture.json"} | decided
    with pytest.raises(KilledError):
        run_capture(folder, tokens, tmp_path / "killed", propagate, kill_at(killed_in * len(tokens) + 3))
    assert set(contents(tmp_path / "killed")) == {state_after(killed_in), "parts.json"}

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


@pytest.mark.parametrize(
    "damage", ["truncated", "flipped", "garbage", "empty", "no hidden states", "a layer short"]
)
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
    elif damage == "flipped":
        state.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
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


def test_a_state_of_other_inputs_is_ignored(build: Build, tokens: torch.Tensor, tmp_path: Path) -> None:
    folder = build(model_type="llama")
    run_capture(folder, tokens, tmp_path / "undisturbed", "sequential")
    with pytest.raises(KilledError):
        run_capture(folder, tokens.flip(0), tmp_path / "killed", "sequential", kill_at(8))
    run_capture(folder, tokens, tmp_path / "killed", "sequential")
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")
