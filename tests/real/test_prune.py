"""Pruning, against importance computed from transformers' own layer in float64."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from camera.checkpoints.checkpoint import Checkpoint
from camera.data import calibration_windows
from camera.options import CalibrationOptions
from tests.real.checkpoint import LAYERS, WIDTH
from tests.real.plain import embedded, importance, layers, linear_inputs, read, reader
from tests.real.workshop import Done, Workshop

pytestmark = pytest.mark.real
Run = Callable[[str], Done]
GATE, UP, DOWN = (f"model.layers.{{}}.mlp.{role}_proj.weight" for role in ("gate", "up", "down"))
ROUNDING = 0.02
"""How far an importance may be from that of another order of bf16 sums, as a share."""


@pytest.fixture(scope="module")
def tokens_ST(workshop: Workshop) -> torch.Tensor:
    """The calibration windows."""
    options = CalibrationOptions(name="stdlib", samples=2, length=128)
    return calibration_windows(options, Checkpoint.open(workshop.model))


@pytest.fixture(scope="module")
def act_TF(workshop: Workshop, tokens_ST: torch.Tensor) -> torch.Tensor:
    """What enters the first down projection of the checkpoint, in bf16."""
    read_it = reader(workshop.model)
    return linear_inputs(read_it, WIDTH, embedded(read_it, tokens_ST))["mlp.down_proj"]


def kept_channels(model: Path, pruned: Path, layer: int) -> torch.Tensor:
    """Which of the source's channels are in a pruned layer, by the bytes of their rows of gate."""
    known = {row.tobytes(): at for at, row in enumerate(raw(read(model, GATE.format(layer))))}
    return torch.tensor([known[row.tobytes()] for row in raw(read(pruned, GATE.format(layer)))])


def raw(matrix: torch.Tensor):
    return matrix.view(torch.int16).numpy()


def assert_highest(kept_K: torch.Tensor, importance_F: torch.Tensor) -> None:
    """No channel that stayed is less important than one that went, rounding apart."""
    gone = torch.ones(len(importance_F), dtype=torch.bool)
    gone[kept_K] = False
    assert importance_F[kept_K].min() >= (1 - ROUNDING) * importance_F[gone].max()


def assert_sliced(model: Path, pruned: Path, layer: int, kept_K: torch.Tensor) -> None:
    """Up and down are those of the channels that stayed, in their order."""
    assert kept_K.tolist() == sorted(set(kept_K.tolist()))
    assert torch.equal(read(pruned, UP.format(layer)), read(model, UP.format(layer))[kept_K])
    assert torch.equal(read(pruned, DOWN.format(layer)), read(model, DOWN.format(layer))[:, kept_K])


def digests(folder: Path) -> dict[str, str]:
    """Of the weights."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def test_the_most_important_channels_stay(
    run: Run, model: Path, act_TF: torch.Tensor, tokens_ST: torch.Tensor
):
    done = run("prune")
    width = done.json["kept_width"]
    assert width == json.loads((done.out / "config.json").read_text())["intermediate_size"] == 10240
    kept_K = kept_channels(model, done.out, 0)
    assert_highest(kept_K, importance(act_TF, read(model, DOWN.format(0)), 0.95))
    assert_sliced(model, done.out, 0, kept_K)
    # sequential: the second layer sees what the pruned first one puts out
    hidden_STH = layers(reader(done.out), width, embedded(reader(model), tokens_ST), [0])
    second_TF = linear_inputs(reader(model), WIDTH, hidden_STH, 1)["mlp.down_proj"]
    kept_K = kept_channels(model, done.out, 1)
    assert_highest(kept_K, importance(second_TF, read(model, DOWN.format(1)), 0.95))
    assert_sliced(model, done.out, 1, kept_K)
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.1.self_attn.o_proj.bias"):
        assert torch.equal(read(done.out, name), read(model, name))


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(workshop: Workshop, run: Run):
    whole = digests(run("prune").out)
    unfinished = workshop.folder / ".prune-killed.partial"
    process = subprocess.Popen(
        [sys.executable, "-m", "camera", *workshop.arguments("prune-killed")],
        cwd=workshop.folder, env=workshop.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    written = 0
    while written < 300 << 20 and process.poll() is None:  # of the shard of the first layer
        time.sleep(0.01)
        written = sum(path.stat().st_blocks << 9 for path in unfinished.glob("*-00002-of-*.safetensors"))
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert unfinished.is_dir()
    assert digests(run("prune-killed").out) == whole
    assert not unfinished.exists()


def test_ranks_keep_the_same_channels(run: Run, model: Path, act_TF: torch.Tensor):
    out = run("prune-ranks").out
    kept_K = kept_channels(model, out, 0)
    assert len(kept_K) == 10240
    assert_highest(kept_K, importance(act_TF, read(model, DOWN.format(0)), 0.95))
    assert_sliced(model, out, 1, kept_channels(model, out, 1))


def test_a_mask_zeroes_the_least_important_channels_and_then_the_least_weights(
    run: Run, model: Path, tokens_ST: torch.Tensor
):
    done = run("prune-mask")
    source = reader(model)
    inputs = linear_inputs(source, WIDTH, embedded(source, tokens_ST).float())
    gate_FH, down_HF = read(done.out, GATE.format(0)), read(done.out, DOWN.format(0))
    kept_K = gate_FH.any(1).nonzero()[:, 0]
    assert len(kept_K) == done.json["kept_width"] == 8960
    assert_highest(kept_K, importance(inputs["mlp.down_proj"], read(model, DOWN.format(0)), 0.5))
    for name, rows, inputs_TI, columns_K in (
        (GATE.format(0), kept_K[:3], inputs["mlp.gate_proj"], torch.arange(gate_FH.shape[1])),
        (DOWN.format(0), torch.arange(3), inputs["mlp.down_proj"], kept_K),
    ):
        before_RK = read(model, name)[rows][:, columns_K]
        after_RK = (gate_FH if "gate" in name else down_HF)[rows][:, columns_K]
        metric_RK = before_RK.float().abs() * inputs_TI.float().norm(dim=0)[columns_K]
        stays_RK = after_RK != 0
        assert torch.equal(after_RK[stays_RK], before_RK[stays_RK])
        assert (stays_RK.float().mean(1) - 0.5).abs().max() < 0.01
        least_R = metric_RK.masked_fill(~stays_RK, torch.inf).amin(1)
        assert (least_R >= (1 - ROUNDING) * metric_RK.masked_fill(stays_RK, 0).amax(1)).all()


def test_a_refit_to_too_few_tokens_falls_back(run: Run, model: Path, act_TF: torch.Tensor):
    done = run("prune-few")
    for decision in done.json["decisions"]:
        assert not decision["refitted"]
        assert "calibration tokens to fit are fewer than" in decision["fallback"]
    kept_K = kept_channels(model, done.out, 0)
    assert_highest(kept_K, importance(act_TF, read(model, DOWN.format(0)), 0.95))
    assert_sliced(model, done.out, 0, kept_K)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prune-refit", "prune-obs"])
def test_refitted_projections_put_out_more_of_what_the_model_did(
    run: Run, model: Path, act_TF: torch.Tensor, name: str
):
    done = run(name)
    assert [decision["refitted"] for decision in done.json["decisions"]] == [1] * LAYERS
    kept_K = kept_channels(model, done.out, 0)
    assert torch.equal(read(done.out, UP.format(0)), read(model, UP.format(0))[kept_K])
    rows = slice(0, 16)
    before_RF, after_RK = (read(folder, DOWN.format(0), rows).float() for folder in (model, done.out))
    act_TF, act_TK = act_TF.float(), act_TF.float()[:, kept_K]
    target_TR = act_TF @ before_RF.T
    sliced, refitted = (
        float((act_TK @ rows_RK.T - target_TR).square().sum()) for rows_RK in (before_RF[:, kept_K], after_RK)
    )
    assert refitted < sliced / 2


def test_statistics_scores_and_slices_come_one_after_the_other(run: Run, model: Path, act_TF: torch.Tensor):
    captured, scored, pruned, saved = (run(name).out for name in ("capture", "score", "prune-scores", "save"))
    statistics = load_file(captured / "statistics.safetensors")
    torch.testing.assert_close(
        statistics["layers.0.sum_squares"], (act_TF.double() ** 2).sum(0), rtol=ROUNDING, atol=0
    )
    torch.testing.assert_close(
        statistics["layers.0.max_abs"].double(), act_TF.double().abs().amax(0), rtol=ROUNDING, atol=0
    )
    importance_F = importance(act_TF, read(model, DOWN.format(0)), 0.95)
    scores_F = load_file(scored / "scores.safetensors")["layers.0.importance"]
    torch.testing.assert_close(scores_F, importance_F, rtol=ROUNDING, atol=0)
    kept = load_file(pruned / "kept.safetensors")
    assert torch.equal(kept["layers.0.kept"], scores_F.topk(10240).indices.sort().values)
    for layer in range(LAYERS):
        kept_K = kept_channels(model, saved, layer)
        assert torch.equal(kept_K, kept[f"layers.{layer}.kept"])
        assert_sliced(model, saved, layer, kept_K)


def test_statistics_behind_pruned_layers_are_gathered_by_ranks(
    run: Run, model: Path, tokens_ST: torch.Tensor
):
    statistics = load_file(run("capture-sequential").out / "statistics.safetensors")
    source = reader(model)
    act_TF = linear_inputs(source, WIDTH, embedded(source, tokens_ST).half())["mlp.down_proj"].double()
    torch.testing.assert_close(statistics["layers.0.sum_squares"], (act_TF**2).sum(0), rtol=ROUNDING, atol=0)
