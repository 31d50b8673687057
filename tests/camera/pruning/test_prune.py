import json
from pathlib import Path

import pytest
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import write_tensors
from camera.errors import CameraError
from camera.options import PruneOptions
from camera.pruning.prune import Pruned, prune
from camera.pruning.score import SCORES, read_scores
from tests.camera.pruning import naive
from tests.camera.pruning.conftest import PRUNE, Build, change_tensors, contents, run_steps
from tests.tiny import tiny_checkpoint


def write_scores(folder: Path, layers: int, width: int) -> Path:
    generator = torch.Generator().manual_seed(3)
    scores = {
        f"layers.{index}.importance": torch.rand(width, dtype=torch.float64, generator=generator)
        for index in range(layers)
    }
    folder.mkdir(exist_ok=True)
    write_tensors(folder / SCORES, scores)
    return folder


def pruned(folder: Path, scored: Path, out: Path, options: PruneOptions) -> Pruned:
    out.mkdir()
    prune(Checkpoint.open(folder), scored, out, options)
    return Pruned.open(out)


def test_physical_keeps_the_rows_and_columns_of_the_best_channels(build: Build, tmp_path: Path) -> None:
    folder = build(model_type="qwen2", ffn=172)
    scored = write_scores(tmp_path / "scored", 3, 172)
    result = pruned(folder, scored, tmp_path / "out", PRUNE)
    assert (result.mode, result.width, result.layers) == ("physical", 124, 3)
    checkpoint = Checkpoint.open(folder)
    for index, (scores_F, kept_K) in enumerate(zip(read_scores(scored, 3), result.kept(), strict=True)):
        kept = naive.best(scores_F.tolist(), 124)
        assert kept_K.tolist() == kept
        gate, up, down = checkpoint.family.ffn_names(index)
        matrices = result.layer(index)
        assert torch.equal(matrices[gate], checkpoint.read(gate)[kept])
        assert torch.equal(matrices[up], checkpoint.read(up)[kept])
        assert torch.equal(matrices[down], checkpoint.read(down)[:, kept])


def test_mask_writes_zeros_for_the_others_and_changes_nothing_else(build: Build, tmp_path: Path) -> None:
    folder = build(model_type="llama", dtype=torch.bfloat16)
    options = PRUNE.model_copy(update={"mode": "mask"})
    result = pruned(folder, write_scores(tmp_path / "scored", 3, 192), tmp_path / "out", options)
    checkpoint = Checkpoint.open(folder)
    for index, kept_K in enumerate(result.kept()):
        gone = torch.ones(192, dtype=torch.bool)
        gone[kept_K] = False
        for name, matrix in result.layer(index).items():
            source = checkpoint.read(name)
            matrix, source = (matrix.T, source.T) if name.endswith("down_proj.weight") else (matrix, source)
            assert matrix.dtype == torch.bfloat16
            assert torch.equal(matrix[~gone], source[~gone])
            assert not matrix[gone].any()
            assert source[gone].any()


def test_the_summary_holds_the_widths_and_the_share_of_importance_that_stays(
    build: Build, tmp_path: Path
) -> None:
    scored = write_scores(tmp_path / "scored", 3, 192)
    pruned(build(model_type="llama"), scored, tmp_path / "out", PRUNE)
    summary = json.loads((tmp_path / "out" / "prune.json").read_text())
    shares = summary.pop("importance_kept_share")
    assert summary == {
        "mode": "physical",
        "ratio": 0.3,
        "multiple_of": 4,
        "layers": 3,
        "hidden_size": 64,
        "width": 192,
        "kept_width": 136,
        "removed_share": pytest.approx(56 / 192),
    }
    for share, scores_F in zip(shares, read_scores(scored, 3), strict=True):
        kept = naive.best(scores_F.tolist(), 136)
        assert share == pytest.approx(sum(scores_F[kept].tolist()) / sum(scores_F.tolist()))
        assert 136 / 192 < share < 1


def test_ratio_zero_changes_no_matrix_and_keeps_every_channel(build: Build, tmp_path: Path) -> None:
    options = PRUNE.model_copy(update={"ratio": 0.0})
    result = pruned(
        build(model_type="llama"), write_scores(tmp_path / "scored", 3, 192), tmp_path / "out", options
    )
    assert set(contents(tmp_path / "out")) == {"kept.safetensors", "prune.json"}
    assert [kept_K.tolist() for kept_K in result.kept()] == [list(range(192))] * 3
    assert result.layer(0) == {}


def test_a_dead_layer_whose_scores_are_all_zero_loses_its_last_channels(build: Build, tmp_path: Path) -> None:
    (tmp_path / "scored").mkdir()
    dead = {f"layers.{index}.importance": torch.zeros(192, dtype=torch.float64) for index in range(3)}
    write_tensors(tmp_path / "scored" / SCORES, dead)
    result = pruned(build(model_type="llama"), tmp_path / "scored", tmp_path / "out", PRUNE)
    assert result.kept()[0].tolist() == list(range(136))


def test_the_same_prune_gives_the_same_bytes(build: Build, tokens: torch.Tensor, tmp_path: Path) -> None:
    folder = build(model_type="PanguEmbedded", ffn=172, shards=3)
    first, second = (run_steps(folder, tokens, tmp_path / name) for name in ("a", "b"))
    assert contents(first.pruned) == contents(second.pruned)


def test_a_ratio_that_prunes_nothing_is_refused(build: Build, tmp_path: Path) -> None:
    options = PruneOptions(ratio=0.2, multiple_of=64)
    with pytest.raises(CameraError, match="nothing would be pruned"):
        pruned(
            build(model_type="qwen2", ffn=172),
            write_scores(tmp_path / "scored", 3, 172),
            tmp_path / "out",
            options,
        )


@pytest.mark.parametrize(("layers", "width"), [(2, 192), (3, 172)])
def test_scores_of_another_model_are_refused(build: Build, tmp_path: Path, layers: int, width: int) -> None:
    scored = write_scores(tmp_path / "scored", layers, width)
    with pytest.raises(CameraError, match=str(scored)):
        pruned(build(model_type="llama"), scored, tmp_path / "out", PRUNE)


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", layers=3)
    name = "model.layers.2.mlp.gate_proj.weight"
    change_tensors(folder, {name: torch.full((192, 64), float("nan"))})
    with pytest.raises(CameraError, match=f"{name} holds NaN"):
        pruned(folder, write_scores(tmp_path / "scored", 3, 192), tmp_path / "out", PRUNE)


@pytest.mark.parametrize("text", ["{}", "[]", "null", "not JSON"])
def test_a_folder_that_prune_did_not_write_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(CameraError, match=r"prune\.json is missing"):
        Pruned.open(tmp_path)
    (tmp_path / "prune.json").write_text(text)
    with pytest.raises(CameraError, match=r"prune\.json is not"):
        Pruned.open(tmp_path)
