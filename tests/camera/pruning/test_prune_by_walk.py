"""Pruning that walks: refit, OBS and steps give one result, streamed or stage by stage, killed or not, alone or shared."""

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import read_tensors
from camera.errors import CameraError
from camera.layerwise import feed_forward as visitor
from camera.layerwise import resume as saving
from camera.options import CaptureOptions, PruneOptions
from camera.progress import Progress, silent
from camera.pruning.capture import STATISTICS
from camera.pruning.outcome import FILES
from camera.pruning.prune import KEPT, SUMMARY, Pruned
from camera.pruning.prune_by_walk import prune_by_walk
from camera.pruning.refit import output_error, refit
from camera.pruning.save import save
from camera.pruning.score import SCORES
from camera.pruning.stream import prune_checkpoint
from camera.pruning.surgery import ROLES
from camera.pruning.wanda import sparsified, zero_share
from tests.camera.pruning.conftest import (
    KINDS,
    ONE_OF_EACH_FAMILY,
    PROPAGATIONS,
    PRUNE,
    Build,
    KilledError,
    contents,
    kill_at,
    logits,
    run_steps,
)
from tests.tiny import TOKENS

PANGU = {"model_type": "PanguEmbedded", "ffn": 172, "shards": 3}
METHODS: dict[str, dict[str, Any]] = {
    "refit": {"refit": True},
    "obs": {"score": "obs", "round": 7},
    "obs and refit": {"score": "obs", "refit": True, "round": 5},
    "two steps": {"steps": 2},
    "all in three steps": {"score": "obs", "refit": True, "steps": 3},
    "sparse": {"sparsity": 0.2},
    "refit and 2:4": {"refit": True, "sparsity": 0.5, "sparsity_pattern": "2:4"},
}


@pytest.fixture(autouse=True)
def _save_after_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "_SHARE", 1e9)


@pytest.fixture
def many() -> torch.Tensor:
    """Sixteen windows: two are held back, and the others have 3584 tokens for 172 or 192 channels."""
    return torch.randint(0, TOKENS, (16, 256), generator=torch.Generator().manual_seed(7))


def options(method: str, **changes: Any) -> PruneOptions:
    return PRUNE.model_copy(update={**METHODS[method], **changes})


def capturing(**changes: Any) -> CaptureOptions:
    return CaptureOptions(**{"device": "cpu", "batch_size": 4, **changes})


def by_walk(
    folder: Path,
    tokens_ST: torch.Tensor,
    out: Path,
    asked: PruneOptions,
    progress: Progress = silent,
    **how: Any,
) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    prune_by_walk(Checkpoint.open(folder), tokens_ST, out, capturing(**how), asked, progress)
    return out


def streamed(
    folder: Path,
    tokens_ST: torch.Tensor,
    out: Path,
    asked: PruneOptions,
    progress: Progress = silent,
    **how: Any,
) -> dict[str, bytes]:
    """The files of the model and those of the decision."""
    decided: dict[str, bytes] = {}

    def look(model: Path, pruned: Path) -> None:
        decided.update({name: (pruned / name).read_bytes() for name in FILES})

    prune_checkpoint(Checkpoint.open(folder), tokens_ST, out, capturing(**how), asked, progress, look)
    return {**contents(out), **decided}


def stepwise(folder: Path, pruned: Path, saved: Path) -> dict[str, bytes]:
    saved.mkdir()
    save(Checkpoint.open(folder), pruned, saved)
    return {**contents(saved), **{name: (pruned / name).read_bytes() for name in FILES}}


# The same result


@pytest.mark.parametrize("propagate", PROPAGATIONS)
@pytest.mark.parametrize("method", METHODS)
def test_one_walk_gives_the_bytes_of_prune_and_save(
    build: Build, many: torch.Tensor, tmp_path: Path, method: str, propagate: str
) -> None:
    folder = build(**PANGU)
    pruned = by_walk(folder, many, tmp_path / "pruned", options(method), propagate=propagate)
    changed = {f"layer-{layer:04d}.safetensors" for layer in range(3)}
    assert set(contents(pruned)) == set(FILES) | changed
    whole = streamed(folder, many, tmp_path / "out", options(method), propagate=propagate)
    assert whole == stepwise(folder, pruned, tmp_path / "saved")


@pytest.mark.parametrize("kind", ONE_OF_EACH_FAMILY)
def test_every_family_is_refitted_and_a_mask_computes_what_slices_compute(
    build: Build, many: torch.Tensor, tmp_path: Path, kind: str
) -> None:
    folder = build(**KINDS[kind])
    asked = options("all in three steps", steps=2)
    sliced = streamed(folder, many, tmp_path / "sliced", asked)
    streamed(folder, many, tmp_path / "masked", asked.model_copy(update={"mode": "mask"}))
    cuts = json.loads(sliced[SUMMARY])["cuts"]
    assert [(cut["step"], cut["layer"]) for cut in cuts] == [(s, n) for s in (1, 2) for n in range(3)]
    assert all(cut["refitted"] for cut in cuts)
    assert Checkpoint.open(tmp_path / "masked").ffn_width == Checkpoint.open(folder).ffn_width
    torch.testing.assert_close(
        logits(tmp_path / "masked", many[:2]), logits(tmp_path / "sliced", many[:2]), rtol=1e-4, atol=1e-4
    )


def whole_model_reference(
    folder: Path, tokens_ST: torch.Tensor, kept: list[torch.Tensor], damping: float
) -> list[torch.Tensor]:
    """Refitted down projections from a model that is whole in memory: each layer sees the refitted ones below it."""
    model = Checkpoint.open(folder).load_model(torch.float32)
    found = []
    for layer, kept_K in zip(model.model.layers, kept, strict=True):
        seen: list[torch.Tensor] = []
        hook = layer.mlp.down_proj.register_forward_pre_hook(
            lambda module, inputs, seen=seen: seen.append(inputs[0])
        )
        with torch.no_grad():
            model(tokens_ST)
        hook.remove()
        act_TF = seen[0].flatten(0, 1).double()
        new_HK = refit(act_TF.T @ act_TF, layer.mlp.down_proj.weight.detach().double(), kept_K, damping)
        assert new_HK is not None
        weight_HF = torch.zeros_like(layer.mlp.down_proj.weight)
        weight_HF[:, kept_K] = new_HK.float()
        layer.mlp.down_proj.weight = torch.nn.Parameter(weight_HF)
        found.append(new_HK)
    return found


@pytest.mark.parametrize("budget", [1 << 30, 0])
def test_streamed_refits_are_those_of_a_model_whole_in_memory(
    build: Build, many: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    monkeypatch.setattr(visitor, "ACTIVATION_BUDGET_BYTES", budget)
    folder = build(model_type="PanguEmbedded")
    pruned = Pruned.open(by_walk(folder, many, tmp_path / "pruned", options("obs and refit")))
    family = Checkpoint.open(folder).family
    expected = whole_model_reference(folder, many, pruned.kept(), 1e-3)
    for index, expected_HK in enumerate(expected):
        found_HK = pruned.layer(index)[family.ffn_names(index)[2]]
        torch.testing.assert_close(found_HK.double(), expected_HK, rtol=1e-2, atol=1e-3)


def test_a_refit_brings_the_model_nearer_to_the_original(
    build: Build, many: torch.Tensor, tmp_path: Path
) -> None:
    folder = build(model_type="PanguEmbedded")
    fresh = torch.randint(0, TOKENS, (4, 64), generator=torch.Generator().manual_seed(8))
    original, distance = logits(folder, fresh), {}
    for name, asked in {"plain": PRUNE, **{name: options(name) for name in METHODS}}.items():
        streamed(folder, many, tmp_path / name, asked)
        distance[name] = float((logits(tmp_path / name, fresh) - original).norm())
    assert distance["refit"] < distance["plain"]
    assert distance["obs and refit"] < distance["plain"]
    assert distance["all in three steps"] < distance["plain"]


def test_a_choice_by_energy_in_one_shot_is_that_of_plain_camera(
    build: Build, many: torch.Tensor, tmp_path: Path
) -> None:
    folder = build(**PANGU)
    steps = run_steps(folder, many, tmp_path / "steps", propagate="one-shot", batch_size=4)
    walked = by_walk(folder, many, tmp_path / "walked", options("refit"), propagate="one-shot")
    for name in (STATISTICS, "capture.json"):
        assert (walked / name).read_bytes() == (steps.captured / name).read_bytes()
    for name in (SCORES, "scores.json"):
        assert (walked / name).read_bytes() == (steps.scored / name).read_bytes()
    assert (walked / KEPT).read_bytes() == (steps.pruned / KEPT).read_bytes()
    down = Checkpoint.open(folder).family.ffn_names(1)
    mine, plain = Pruned.open(walked).layer(1), Pruned.open(steps.pruned).layer(1)
    assert [torch.equal(mine[name], plain[name]) for name in down] == [True, True, False]


def test_too_few_tokens_leave_a_plainly_pruned_model_that_says_so(
    build: Build, tokens: torch.Tensor, tmp_path: Path
) -> None:
    folder = build(**PANGU)
    plain = streamed(folder, tokens, tmp_path / "plain", PRUNE)
    refused = streamed(folder, tokens, tmp_path / "refused", options("obs and refit"))
    assert {name for name in plain if plain[name] != refused[name]} == {SUMMARY}
    for cut in json.loads(refused[SUMMARY])["cuts"]:
        assert not cut["refitted"]
        assert "fewer than 4 for each of the 172 FFN channels" in cut["refused"]


def test_ratio_zero_changes_nothing(build: Build, many: torch.Tensor, tmp_path: Path) -> None:
    folder = build(model_type="llama")
    whole = streamed(folder, many, tmp_path / "out", options("all in three steps", ratio=0.0))
    assert all(whole[name] == data for name, data in contents(folder).items())


def test_gate_and_up_of_several_steps_are_the_sources_rows(
    build: Build, many: torch.Tensor, tmp_path: Path
) -> None:
    folder = build(**PANGU)
    pruned = Pruned.open(by_walk(folder, many, tmp_path / "pruned", options("all in three steps")))
    source = Checkpoint.open(folder)
    for index, kept_K in enumerate(pruned.kept()):
        gate, up, _ = source.family.ffn_names(index)
        assert len(kept_K) == 124
        for name in (gate, up):
            assert torch.equal(pruned.layer(index)[name], source.read(name)[kept_K])


# Sparse


@pytest.mark.parametrize("ratio", [0.0, 0.3])
def test_zeros_are_where_wandas_metric_is_least_and_are_counted(
    build: Build, many: torch.Tensor, tmp_path: Path, ratio: float
) -> None:
    folder = build(**PANGU)
    asked = options("sparse", ratio=ratio)
    pruned = Pruned.open(by_walk(folder, many, tmp_path / "pruned", asked, propagate="one-shot"))
    plain = run_steps(folder, many, tmp_path / "plain", PRUNE, propagate="one-shot").pruned
    source = Checkpoint.open(folder)
    model = source.load_model(torch.float32)
    mlp, seen = model.model.layers[1].mlp, {}
    for name in ("gate_proj", "down_proj"):
        getattr(mlp, name).register_forward_pre_hook(
            lambda module, inputs, name=name: seen.update({name: inputs[0].double().square().sum((0, 1))})
        )
    with torch.no_grad():
        model(many)
    kept_K = pruned.kept()[1]
    if ratio:
        assert torch.equal(kept_K, Pruned.open(plain).kept()[1])
    gate, up, down = source.family.ffn_names(1)
    found = pruned.layer(1)
    for name, inputs in (
        (gate, seen["gate_proj"]),
        (up, seen["gate_proj"]),
        (down, seen["down_proj"][kept_K]),
    ):
        own = source.read(name)
        own = own[:, kept_K] if name == down else own[kept_K]
        assert torch.equal(found[name], sparsified(own, inputs, 0.2, "unstructured"))
    (record,) = (
        cut for cut in json.loads((pruned.folder / SUMMARY).read_text())["cuts"] if cut["layer"] == 1
    )
    counted = {role: zero_share(found[name]) for role, name in zip(ROLES, (gate, up, down), strict=True)}
    assert record["zero_shares"] == counted
    assert all(0.17 < share <= 0.2 for share in counted.values())


def test_a_layer_sees_what_the_sparse_layers_below_it_put_out(
    build: Build, many: torch.Tensor, tmp_path: Path
) -> None:
    folder = build(**PANGU)
    pruned = Pruned.open(by_walk(folder, many, tmp_path / "sparse", options("sparse", sparsity=0.5)))
    out = tmp_path / "saved"
    out.mkdir()
    save(Checkpoint.open(folder), pruned.folder, out)
    # The dense last layer behind the sparse ones below it: its inputs are those that its statistics were made from.
    model = Checkpoint.open(out).load_model(torch.float32)
    dense = Checkpoint.open(folder).load_model(torch.float32)
    model.model.layers[2] = dense.model.layers[2]
    seen: list[torch.Tensor] = []
    model.model.layers[2].mlp.down_proj.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].double().square().sum((0, 1)))
    )
    with torch.no_grad():
        model(many)
    measured = read_tensors(pruned.folder / STATISTICS)["layers.2.sum_squares"]
    torch.testing.assert_close(measured, seen[0], rtol=1e-4, atol=1e-6)


def test_a_2_4_pattern_of_rows_that_are_no_fours_is_refused(
    build: Build, many: torch.Tensor, tmp_path: Path
) -> None:
    asked = options("refit and 2:4", multiple_of=1)
    with pytest.raises(
        CameraError, match="2:4 needs rows of a multiple of 4: 121 kept FFN channels are none"
    ):
        streamed(build(**PANGU), many, tmp_path / "out", asked)
    assert not list(tmp_path.iterdir())


# Killed and resumed


@pytest.mark.parametrize("propagate", PROPAGATIONS)
@pytest.mark.parametrize("method", ["obs and refit", "all in three steps", "refit and 2:4"])
def test_a_walk_killed_again_and_again_ends_with_the_same_bytes(
    build: Build, many: torch.Tensor, tmp_path: Path, method: str, propagate: str
) -> None:
    folder, chance = build(**PANGU), random.Random(method + propagate)
    asked = options(method)
    total = 16 * 3 * asked.steps
    limits = sorted(chance.randint(1, total - 1) for _ in range(4))
    for run in (
        partial(by_walk, folder, many, tmp_path / "stage"),
        partial(streamed, folder, many, tmp_path / "model"),
    ):
        for limit in limits:
            with pytest.raises(KilledError):
                run(asked, progress=kill_at(limit), propagate=propagate)
    by_walk(folder, many, tmp_path / "stage", asked, propagate=propagate)
    whole = streamed(folder, many, tmp_path / "model", asked, propagate=propagate)
    undisturbed = by_walk(folder, many, tmp_path / "undisturbed", asked, propagate=propagate)
    assert contents(tmp_path / "stage") == contents(undisturbed)
    assert whole == stepwise(folder, undisturbed, tmp_path / "saved")


def test_a_resumed_walk_computes_no_finished_layer_again(
    build: Build, many: torch.Tensor, tmp_path: Path, read_names: list[str]
) -> None:
    folder, asked = build(**PANGU), options("all in three steps")
    with pytest.raises(KilledError):
        by_walk(
            folder, many, tmp_path / "out", asked, kill_at(16 * 4 + 2)
        )  # in the second layer of the second step
    work = tmp_path / "out" / ".work"
    assert (work / "step-1" / "config.json").is_file()
    read_names.clear()
    told: list[int] = []
    by_walk(folder, many, tmp_path / "out", asked, lambda done, total: told.append(done))
    assert min(told) > 16 * 4
    assert not work.exists()


def test_what_another_walk_left_is_not_gone_on_with(build: Build, many: torch.Tensor, tmp_path: Path) -> None:
    folder = build(**PANGU)
    with pytest.raises(KilledError):
        by_walk(folder, many, tmp_path / "out", options("obs and refit"), kill_at(40))
    other = options("obs and refit", damping=0.1)
    by_walk(folder, many, tmp_path / "out", other)
    assert contents(tmp_path / "out") == contents(by_walk(folder, many, tmp_path / "fresh", other))


# Shared


def test_two_ranks_keep_the_same_channels_and_nearly_the_same_weights(
    build: Build, many: torch.Tensor, tmp_path: Path
) -> None:
    folder = build(**PANGU)
    alone, shared = (
        Pruned.open(by_walk(folder, many, tmp_path / str(count), options("obs and refit"), devices=count))
        for count in (1, 2)
    )
    cuts = [json.loads((pruned.folder / SUMMARY).read_text())["cuts"] for pruned in (alone, shared)]
    assert [cut["fit_tokens"] for cut in cuts[1]] == [cut["fit_tokens"] for cut in cuts[0]] == [3584] * 3
    for index in range(3):
        assert torch.equal(shared.kept()[index], alone.kept()[index])
        for name, matrix in alone.layer(index).items():
            torch.testing.assert_close(shared.layer(index)[name], matrix, rtol=1e-3, atol=1e-4)


# What is recorded


def test_the_recorded_error_is_that_of_held_back_tokens(
    build: Build, many: torch.Tensor, tmp_path: Path
) -> None:
    folder = build(model_type="llama")
    pruned = Pruned.open(by_walk(folder, many, tmp_path / "pruned", options("refit"), propagate="one-shot"))
    summary = json.loads((pruned.folder / SUMMARY).read_text())
    assert (summary["refit"], summary["damping"]) == (True, 0.001)
    model = Checkpoint.open(folder).load_model(torch.float32)
    seen: list[torch.Tensor] = []
    down = model.model.layers[0].mlp.down_proj
    down.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(many[[7, 15]])
    act_TF = seen[0].flatten(0, 1).double()
    kept_K = pruned.kept()[0]
    weight_HF = down.weight.detach().double()
    plain = output_error(act_TF.T @ act_TF, weight_HF, kept_K, weight_HF[:, kept_K])
    assert summary["cuts"][0]["error_plain"] == pytest.approx(plain, rel=1e-4)
    assert summary["cuts"][0]["error"] < plain


def test_the_kept_channels_are_the_same_in_every_file(
    build: Build, many: torch.Tensor, tmp_path: Path
) -> None:
    folder = build(**PANGU)
    out = by_walk(folder, many, tmp_path / "out", options("all in three steps"))
    kept = read_tensors(out / KEPT)
    scores = read_tensors(out / SCORES)
    shares = json.loads((out / SUMMARY).read_text())["importance_kept_share"]
    for index, share in enumerate(shares):
        scores_F = scores[f"layers.{index}.importance"]
        assert len(scores_F) == 172
        assert float(scores_F[kept[f"layers.{index}.kept"]].sum() / scores_F.sum()) == pytest.approx(share)
