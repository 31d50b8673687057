"""Layers of different widths: measured, padded to one, and the same streamed or stage by stage, killed or not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.files import read_json
from camera.layerwise import resume as saving
from camera.options import CaptureOptions, PruneOptions
from camera.pruning import widths as measuring
from camera.pruning.layer_loss import layer_losses
from camera.pruning.outcome import FILES
from camera.pruning.prune import SUMMARY, Pruned
from camera.pruning.prune_by_walk import prune_by_walk
from camera.pruning.save import save
from camera.pruning.stream import prune_checkpoint, unfinished
from camera.pruning.widths import CURVES
from tests.camera.pruning.conftest import Build, KilledError, contents, kill_at, logits
from tests.tiny import TOKENS

PANGU = {"model_type": "PanguEmbedded", "ffn": 172, "shards": 3}
CAPTURE = CaptureOptions(device="cpu", batch_size=8)
PER_LAYER = PruneOptions(ratio=0.3, multiple_of=4, allocation="per_layer", allocation_windows=2)


@pytest.fixture
def many() -> torch.Tensor:
    return torch.randint(0, TOKENS, (16, 64), generator=torch.Generator().manual_seed(7))


def pruned(
    folder: Path, tokens_ST: torch.Tensor, out: Path, asked: PruneOptions, **more: Any
) -> dict[str, Any]:
    """The summary of a model pruned to `out`."""
    found: dict[str, Any] = {}

    def look(model: Path, decided: Path) -> None:
        found.update(read_json(decided / SUMMARY))

    prune_checkpoint(Checkpoint.open(folder), tokens_ST, out, CAPTURE, asked, finish=look, **more)
    return found


@pytest.mark.parametrize("kind", [PANGU, {"model_type": "qwen2", "tied": True}])
def test_the_model_is_padded_with_zeros_and_computes_what_it_computes_unpadded(
    build: Build, many: torch.Tensor, tmp_path: Path, kind: dict[str, Any]
) -> None:
    summary = pruned(build(**kind), many, tmp_path / "out", PER_LAYER)
    widths = summary["allocated"]["widths"]
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert len(set(widths)) > 1
    assert checkpoint.ffn_width == max(widths) == summary["kept_width"]
    assert sum(widths) == len(widths) * summary["allocated"]["uniform_width"]
    model = checkpoint.load_model(torch.float32)
    padded = model(many[:2]).logits
    for layer, width in zip(model.model.layers, widths, strict=True):
        mlp = layer.mlp
        for linear, dim in ((mlp.gate_proj, 0), (mlp.up_proj, 0), (mlp.down_proj, 1)):
            kept, rest = linear.weight.detach().split([width, max(widths) - width], dim)
            assert not rest.any()
            assert kept.any(dim=1 - dim).all()
            linear.weight = torch.nn.Parameter(kept)
    torch.testing.assert_close(model(many[:2]).logits, padded, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [{}, {"refit": True, "score": "obs", "sparsity": 0.25}])
def test_stage_by_stage_gives_the_bytes_of_one_walk(
    build: Build, tmp_path: Path, method: dict[str, Any]
) -> None:
    folder = build(**PANGU)
    tokens = torch.randint(0, TOKENS, (16, 128), generator=torch.Generator().manual_seed(7))
    asked = PER_LAYER.model_copy(update=method)
    summary = pruned(folder, tokens, tmp_path / "out", asked)
    for name in ("pruned", "saved"):
        (tmp_path / name).mkdir()
    prune_by_walk(Checkpoint.open(folder), tokens, tmp_path / "pruned", CAPTURE, asked)
    save(Checkpoint.open(folder), tmp_path / "pruned", tmp_path / "saved")
    assert contents(tmp_path / "saved") == contents(tmp_path / "out")
    assert json.loads((tmp_path / "pruned" / SUMMARY).read_text()) == summary
    assert {path.name for path in (tmp_path / "pruned").iterdir()} == {
        *FILES,
        *(f"layer-{layer:04d}.safetensors" for layer in range(3)),
    }
    kept = Pruned.open(tmp_path / "pruned").kept()
    assert [len(kept_K) for kept_K in kept] == summary["allocated"]["widths"]


def test_a_mask_of_the_same_channels_computes_the_same(
    build: Build, many: torch.Tensor, tmp_path: Path
) -> None:
    folder = build(**PANGU)
    pruned(folder, many, tmp_path / "sliced", PER_LAYER)
    pruned(folder, many, tmp_path / "masked", PER_LAYER.model_copy(update={"mode": "mask"}))
    assert Checkpoint.open(tmp_path / "masked").ffn_width == 172
    torch.testing.assert_close(
        logits(tmp_path / "masked", many[:2]), logits(tmp_path / "sliced", many[:2]), rtol=1e-4, atol=1e-4
    )


def test_losses_are_the_divergences_of_models_with_one_layer_cut(
    build: Build, many: torch.Tensor, tmp_path: Path
) -> None:
    folder = build(model_type="llama", tied=True, shards=3)
    one_width = PER_LAYER.model_copy(update={"allocation": "uniform", "mode": "mask", "ratio": 0.5})
    pruned(folder, many, tmp_path / "cut", one_width)
    dense, cut = Checkpoint.open(folder), Checkpoint.open(tmp_path / "cut")
    found = layer_losses(dense, cut, many[:3], CAPTURE)
    reference = dense.load_model(torch.float32)
    with torch.no_grad():
        log_p = reference(many[:3]).logits.log_softmax(-1)
        for layer, loss in enumerate(found):
            model = dense.load_model(torch.float32)
            for name in dense.family.ffn_names(layer):
                model.get_parameter(name).copy_(cut.read(name))
            log_q = model(many[:3]).logits.log_softmax(-1)
            assert loss == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-3)
            assert loss > 0


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_a_killed_prune_keeps_its_curves_and_ends_with_the_same_bytes(
    build: Build, many: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    monkeypatch.setattr(saving, "_SHARE", 1e9)
    folder = build(**PANGU)
    ends: list[int] = []
    pruned(folder, many, tmp_path / "whole", PER_LAYER, progress=lambda done, total: ends.append(total))
    assert len(set(ends)) == 1
    with pytest.raises(KilledError):
        pruned(folder, many, tmp_path / "out", PER_LAYER, progress=kill_at(int(share * ends[0])))
    kept = len(list((unfinished(tmp_path / "out") / CURVES).glob("curve-*.json")))
    measured: list[int] = []
    measure = measuring.layer_losses

    def counted(*arguments: Any) -> list[float]:
        measured.append(1)
        return measure(*arguments)

    monkeypatch.setattr(measuring, "layer_losses", counted)
    summary = pruned(folder, many, tmp_path / "out", PER_LAYER)
    assert kept + len(measured) == len(summary["allocated"]["measured_widths"])
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_ratio_0_measures_nothing_and_changes_nothing(
    build: Build, many: torch.Tensor, tmp_path: Path
) -> None:
    folder = build(**PANGU)
    summary = pruned(folder, many, tmp_path / "out", PER_LAYER.model_copy(update={"ratio": 0.0}))
    assert "allocated" not in summary
    assert contents(tmp_path / "out") == contents(folder)
