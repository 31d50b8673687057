import json
from pathlib import Path

import pytest
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import write_tensors
from camera.errors import CameraError
from camera.options import CaptureOptions, PruneOptions
from camera.pruning.folders import SCORES
from camera.pruning.plan import plan_prune
from camera.pruning.stages import prune
from camera.pruning.summary import Pruned
from tests.camera.pruning import naive
from tests.camera.pruning.conftest import PRUNE, Build, contents, only_kept, only_scores, run_steps


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
    checkpoint = Checkpoint.open(folder)
    prune(checkpoint, scored, out, plan_prune(checkpoint, CaptureOptions(), options), options)
    return Pruned.open(out)


def test_the_best_channels_stay_and_no_matrix_is_copied(build: Build, tmp_path: Path) -> None:
    scored = write_scores(tmp_path / "scored", 3, 172)
    result = pruned(build(model_type="qwen2", ffn=172), scored, tmp_path / "out", PRUNE)
    assert (result.mode, result.width, result.layers) == ("physical", 124, 3)
    for scores_F, kept_K in zip(only_scores(scored, 3), only_kept(result), strict=True):
        assert kept_K.tolist() == naive.best(scores_F.tolist(), 124)
    assert set(contents(tmp_path / "out")) == {"kept.safetensors", "prune.json"}


def test_what_capture_decided_is_the_choice(build: Build, tokens: torch.Tensor, tmp_path: Path) -> None:
    steps = run_steps(build(model_type="llama"), tokens, tmp_path, propagate="sequential")
    for folder in (steps.scored, steps.pruned):
        assert contents(folder)["kept.safetensors"] == contents(steps.captured)["kept.safetensors"]


def test_another_ratio_than_capture_decided_for_is_refused(
    build: Build, tokens: torch.Tensor, tmp_path: Path
) -> None:
    folder = build(model_type="llama")
    steps = run_steps(folder, tokens, tmp_path, propagate="sequential")
    more = PRUNE.model_copy(update={"ratio": 0.5})
    with pytest.raises(CameraError, match="capture kept 136 channels of each layer, and 96 are asked for"):
        pruned(folder, steps.scored, tmp_path / "out", more)


def test_a_decision_by_another_method_is_refused(build: Build, tokens: torch.Tensor, tmp_path: Path) -> None:
    folder = build(model_type="llama")
    obs = PRUNE.model_copy(update={"method": "obs"})
    steps = run_steps(folder, tokens, tmp_path, obs, propagate="sequential")
    with pytest.raises(
        CameraError, match="capture decided with method obs and sparsity 0, and camera and 0 are"
    ):
        pruned(folder, steps.scored, tmp_path / "out", PRUNE)


def test_new_matrices_are_not_left_out_silently(build: Build, tokens: torch.Tensor, tmp_path: Path) -> None:
    folder = build(model_type="llama")
    obs = PRUNE.model_copy(update={"method": "obs"})
    steps = run_steps(folder, tokens, tmp_path, obs, propagate="sequential")
    with pytest.raises(CameraError, match="obs changes matrices: name the folder that capture wrote"):
        pruned(folder, steps.scored, tmp_path / "out", obs)


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
        "method": "camera",
        "sparsity": 0.0,
        "layers": 3,
        "hidden_size": 64,
        "width": 192,
        "kept_width": 136,
        "config": {"intermediate_size": 136},
        "removed_share": pytest.approx(56 / 192),
    }
    for share, scores_F in zip(shares, only_scores(scored, 3), strict=True):
        kept = naive.best(scores_F.tolist(), 136)
        assert share == pytest.approx(sum(scores_F[kept].tolist()) / sum(scores_F.tolist()))
        assert 136 / 192 < share < 1


def test_ratio_zero_changes_no_matrix_and_keeps_every_channel(build: Build, tmp_path: Path) -> None:
    options = PRUNE.model_copy(update={"ratio": 0.0})
    result = pruned(
        build(model_type="llama"), write_scores(tmp_path / "scored", 3, 192), tmp_path / "out", options
    )
    assert [kept_K.tolist() for kept_K in only_kept(result)] == [list(range(192))] * 3
    assert not result.changed


def test_a_dead_layer_whose_scores_are_all_zero_loses_its_last_channels(build: Build, tmp_path: Path) -> None:
    (tmp_path / "scored").mkdir()
    dead = {f"layers.{index}.importance": torch.zeros(192, dtype=torch.float64) for index in range(3)}
    write_tensors(tmp_path / "scored" / SCORES, dead)
    result = pruned(build(model_type="llama"), tmp_path / "scored", tmp_path / "out", PRUNE)
    assert only_kept(result)[0].tolist() == list(range(136))


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


@pytest.mark.parametrize("text", ["{}", "[]", "null", "not JSON"])
def test_a_folder_that_prune_did_not_write_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(CameraError, match=r"prune\.json is missing"):
        Pruned.open(tmp_path)
    (tmp_path / "prune.json").write_text(text)
    with pytest.raises(CameraError, match=r"prune\.json is not"):
        Pruned.open(tmp_path)
