"""Refit, OBS and sparsity give one result: in one run or stage by stage, killed or not, on one device or several."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import read_tensors
from camera.layerwise import feed_forward as visitor
from camera.layerwise import resume as saving
from camera.layerwise.gram import Moments, token_scales
from camera.options import CaptureOptions, PruneOptions
from camera.progress import Progress, silent
from camera.pruning.folders import KEPT, SCORES, STATISTICS
from camera.pruning.methods.refit import output_error, refit
from camera.pruning.plan import plan_prune
from camera.pruning.prune_checkpoint import prune_checkpoint
from camera.pruning.sparsity import sparsified, zero_share
from camera.pruning.stages import capture
from camera.pruning.summary import SUMMARY, Pruned
from tests.camera.pruning.conftest import (
    KINDS,
    ONE_OF_EACH_FAMILY,
    PROPAGATIONS,
    PRUNE,
    Build,
    KilledError,
    Steps,
    contents,
    kill_at,
    logits,
    only_kept,
    run_steps,
)
from tests.tiny import TOKENS

PANGU = {"model_type": "PanguEmbedded", "ffn": 172, "shards": 3}
METHODS: dict[str, dict[str, Any]] = {
    "refit": {"method": "refit"},
    "obs": {"method": "obs", "round": 5},
    "sparse": {"sparsity": 0.2},
    "sparse refit": {"method": "refit", "sparsity": 0.5},
}
FILES = (KEPT, SUMMARY, STATISTICS, "capture.json", SCORES, "scores.json")


@pytest.fixture(autouse=True)
def _save_after_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "RULE", saving.SaveRule(0, 1e9))


@pytest.fixture
def many() -> torch.Tensor:
    """Sixteen windows: two are held back, and the others have 3584 tokens for 172 or 192 channels."""
    return torch.randint(0, TOKENS, (16, 256), generator=torch.Generator().manual_seed(7))


def options(method: str, **changes: Any) -> PruneOptions:
    return PRUNE.model_copy(update={**METHODS[method], **changes})


def capturing(**changes: Any) -> CaptureOptions:
    return CaptureOptions(**{"device": "cpu", "batch_size": 4, **changes})


def by_stages(folder: Path, tokens_ST: torch.Tensor, work: Path, asked: PruneOptions, **how: Any) -> Steps:
    return run_steps(folder, tokens_ST, work, asked, **{"batch_size": 4, **how})


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


def stepwise(steps: Steps) -> dict[str, bytes]:
    """The same of four stages."""
    files = {**contents(steps.captured), **contents(steps.scored), **contents(steps.pruned)}
    return {**contents(steps.saved), **{name: files[name] for name in FILES}}


# The same result


@pytest.mark.parametrize("propagate", PROPAGATIONS)
@pytest.mark.parametrize("method", METHODS)
def test_one_run_gives_the_bytes_of_four_stages(
    build: Build, many: torch.Tensor, tmp_path: Path, method: str, propagate: str
) -> None:
    folder = build(**PANGU)
    steps = by_stages(folder, many, tmp_path / "stages", options(method), propagate=propagate)
    changed = {f"layer-{layer:04d}.safetensors" for layer in range(3)}
    assert {name for name in contents(steps.pruned) if name.startswith("layer-")} == changed
    whole = streamed(folder, many, tmp_path / "out", options(method), propagate=propagate)
    assert whole == stepwise(steps)


@pytest.mark.parametrize("kind", ONE_OF_EACH_FAMILY)
def test_every_family_is_refitted_and_a_mask_computes_what_slices_compute(
    build: Build, many: torch.Tensor, tmp_path: Path, kind: str
) -> None:
    folder = build(**KINDS[kind])
    asked = options("obs")
    sliced = streamed(folder, many, tmp_path / "sliced", asked)
    streamed(folder, many, tmp_path / "masked", asked.model_copy(update={"mode": "mask"}))
    decisions = json.loads(sliced[SUMMARY])["decisions"]
    assert [decision["layer"] for decision in decisions] == [0, 1, 2]
    assert all(decision["refitted"] for decision in decisions)
    assert Checkpoint.open(tmp_path / "masked").ffn_width == Checkpoint.open(folder).ffn_width
    torch.testing.assert_close(
        logits(tmp_path / "masked", many[:2]), logits(tmp_path / "sliced", many[:2]), rtol=1e-4, atol=1e-4
    )


def layer_tensors(model: Any, tokens_ST: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What enters a layer's down projection, and what the layer puts out: [samples, tokens, …]."""
    seen: list[torch.Tensor] = []
    module = model.model.layers[layer]
    hooks = (
        module.mlp.down_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])),
        module.register_forward_hook(lambda _, inputs, out: seen.append(out)),
    )
    with torch.no_grad():
        model(tokens_ST)
    for hook in hooks:
        hook.remove()
    return seen[0], seen[1]


def whole_model_reference(
    folder: Path, tokens_ST: torch.Tensor, kept: list[torch.Tensor], asked: PruneOptions
) -> list[torch.Tensor]:
    """Refitted down projections from a model that is whole in memory: each layer sees the refitted ones below it."""
    source, model = (Checkpoint.open(folder).load_model(torch.float32) for _ in range(2))
    found = []
    for index, kept_K in enumerate(kept):
        act_STF, ends_STH = layer_tensors(model, tokens_ST, index)
        wanted_STH = layer_tensors(source, tokens_ST, index)[1] if asked.target == "source" else ends_STH
        scale_ST1 = token_scales(wanted_STH)
        act_TF = (act_STF * scale_ST1).flatten(0, 1).double()
        missing_TH = ((wanted_STH - ends_STH) * scale_ST1).flatten(0, 1).double()
        down = model.model.layers[index].mlp.down_proj
        new_HK = refit(
            Moments(act_TF.T @ act_TF),
            down.weight.detach().double(),
            kept_K,
            asked.damping or 0.0,
            act_TF.T @ missing_TH,
        )
        assert new_HK is not None
        weight_HF = torch.zeros_like(down.weight)
        weight_HF[:, kept_K] = new_HK.float()
        down.weight = torch.nn.Parameter(weight_HF)
        found.append(new_HK)
    return found


@pytest.mark.parametrize(("target", "budget"), [("source", 1 << 30), ("source", 0), ("layer", 0)])
def test_streamed_refits_are_those_of_a_model_whole_in_memory(
    build: Build,
    many: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    budget: int,
) -> None:
    monkeypatch.setattr(visitor, "ACTIVATION_BUDGET_BYTES", budget)
    folder, asked = build(model_type="PanguEmbedded"), options("obs", damping=0.01, target=target)
    pruned = Pruned.open(by_stages(folder, many, tmp_path, asked).pruned)
    source = Checkpoint.open(folder)
    expected = whole_model_reference(folder, many, only_kept(pruned), asked)
    for index, expected_HK in enumerate(expected):
        found_HK = pruned.matrices(index)[source.blocks(index)[0].down]
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
    assert distance["obs"] < distance["plain"]


def test_a_refit_in_one_shot_keeps_cameras_channels_and_changes_down_alone(
    build: Build, many: torch.Tensor, tmp_path: Path
) -> None:
    folder = build(**PANGU)
    plain = by_stages(folder, many, tmp_path / "plain", PRUNE, propagate="one-shot")
    refitted = by_stages(folder, many, tmp_path / "refit", options("refit"), propagate="one-shot")
    for name in (STATISTICS, "capture.json"):
        assert (refitted.captured / name).read_bytes() == (plain.captured / name).read_bytes()
    for name in (SCORES, "scores.json"):
        assert (refitted.scored / name).read_bytes() == (plain.scored / name).read_bytes()
    assert (refitted.pruned / KEPT).read_bytes() == (plain.pruned / KEPT).read_bytes()
    assert set(Pruned.open(refitted.pruned).matrices(1)) == {"model.layers.1.mlp.down_proj.weight"}


def test_too_few_tokens_fall_back_to_camera_and_say_so(
    build: Build, tokens: torch.Tensor, tmp_path: Path
) -> None:
    folder = build(**PANGU)
    plain = streamed(folder, tokens, tmp_path / "plain", PRUNE)
    rejected = streamed(folder, tokens, tmp_path / "rejected", options("obs"))
    assert {name for name in plain if plain[name] != rejected[name]} == {SUMMARY}
    for decision in json.loads(rejected[SUMMARY])["decisions"]:
        assert not decision["refitted"]
        assert "fewer than 4 for each of the 172 FFN channels" in decision["fallback"]


@pytest.mark.parametrize("method", ["refit", "obs"])
def test_ratio_zero_changes_nothing(build: Build, many: torch.Tensor, tmp_path: Path, method: str) -> None:
    folder = build(model_type="llama")
    whole = streamed(folder, many, tmp_path / "out", options(method, ratio=0.0))
    assert all(whole[name] == data for name, data in contents(folder).items())


# Sparse


@pytest.mark.parametrize("ratio", [0.0, 0.3])
def test_zeros_are_where_wandas_metric_is_least_and_are_counted(
    build: Build, many: torch.Tensor, tmp_path: Path, ratio: float
) -> None:
    folder = build(**PANGU)
    asked = options("sparse", ratio=ratio)
    pruned = Pruned.open(by_stages(folder, many, tmp_path / "sparse", asked, propagate="one-shot").pruned)
    plain = by_stages(folder, many, tmp_path / "plain", PRUNE, propagate="one-shot").pruned
    source = Checkpoint.open(folder)
    model = source.load_model(torch.float32)
    mlp, seen = model.model.layers[1].mlp, {}
    for name in ("gate_proj", "down_proj"):
        getattr(mlp, name).register_forward_pre_hook(
            lambda module, inputs, name=name: seen.update({name: inputs[0].double().square().sum((0, 1))})
        )
    with torch.no_grad():
        model(many)
    kept_K = only_kept(pruned)[1]
    if ratio:
        assert torch.equal(kept_K, only_kept(Pruned.open(plain))[1])
    gate, up, down = source.ffn_names(1)
    found = pruned.matrices(1)
    for name, inputs in (
        (gate, seen["gate_proj"]),
        (up, seen["gate_proj"]),
        (down, seen["down_proj"][kept_K]),
    ):
        own = source.read(name)
        own = own[:, kept_K] if name == down else own[kept_K]
        assert torch.equal(found[name], sparsified(own, inputs, 0.2))
    record = json.loads((pruned.folder / SUMMARY).read_text())["decisions"][1]
    counted = {
        role: zero_share(found[name])
        for role, name in zip(("gate", "up", "down"), (gate, up, down), strict=True)
    }
    assert record["zero_shares"] == counted
    assert all(0.17 < share <= 0.2 for share in counted.values())


def test_a_layer_sees_what_the_sparse_layers_below_it_put_out(
    build: Build, many: torch.Tensor, tmp_path: Path
) -> None:
    folder = build(**PANGU)
    steps = by_stages(folder, many, tmp_path, options("sparse", sparsity=0.5))
    # The dense last layer behind the sparse ones below it: its inputs are those that its statistics were made from.
    model = Checkpoint.open(steps.saved).load_model(torch.float32)
    dense = Checkpoint.open(folder).load_model(torch.float32)
    model.model.layers[2] = dense.model.layers[2]
    seen: list[torch.Tensor] = []
    model.model.layers[2].mlp.down_proj.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].double().square().sum((0, 1)))
    )
    with torch.no_grad():
        model(many)
    measured = read_tensors(steps.captured / STATISTICS)["layers.2.sum_squares"]
    torch.testing.assert_close(measured, seen[0], rtol=1e-4, atol=1e-6)


# Killed and resumed


def captured(
    folder: Path, tokens_ST: torch.Tensor, out: Path, asked: PruneOptions, progress: Progress = silent
) -> dict[str, bytes]:
    """The files of a capture that decides."""
    out.mkdir(exist_ok=True)
    checkpoint = Checkpoint.open(folder)
    plan = plan_prune(checkpoint, capturing(), asked)
    capture(checkpoint, tokens_ST, out, capturing(), plan, progress)
    return contents(out)


@pytest.mark.parametrize("method", ["obs", "sparse refit"])
def test_a_run_killed_again_and_again_ends_with_the_same_bytes(
    build: Build, many: torch.Tensor, tmp_path: Path, method: str
) -> None:
    folder, chance, asked = build(**PANGU), random.Random(method), options(method)
    for run in (captured, streamed):
        name = run.__name__
        undisturbed = run(folder, many, tmp_path / f"{name}-undisturbed", asked)
        for limit in sorted(chance.randint(1, 16 * 3 - 1) for _ in range(4)):
            with pytest.raises(KilledError):
                run(folder, many, tmp_path / name, asked, kill_at(limit))
        assert run(folder, many, tmp_path / name, asked) == undisturbed


def test_what_another_run_left_is_not_gone_on_with(build: Build, many: torch.Tensor, tmp_path: Path) -> None:
    folder = build(**PANGU)
    with pytest.raises(KilledError):
        captured(folder, many, tmp_path / "out", options("obs"), kill_at(40))
    other = options("obs", damping=0.1)
    assert captured(folder, many, tmp_path / "out", other) == captured(
        folder, many, tmp_path / "fresh", other
    )


# Shared


def test_two_ranks_keep_the_same_channels_and_nearly_the_same_weights(
    build: Build, many: torch.Tensor, tmp_path: Path
) -> None:
    folder = build(**PANGU)
    alone, shared = (
        Pruned.open(by_stages(folder, many, tmp_path / str(count), options("obs"), devices=count).pruned)
        for count in (1, 2)
    )
    for pruned in (alone, shared):
        decisions = json.loads((pruned.folder / SUMMARY).read_text())["decisions"]
        assert [decision["fit_tokens"] for decision in decisions] == [3584] * 3
    for index in range(3):
        assert torch.equal(only_kept(shared)[index], only_kept(alone)[index])
        for name, matrix in alone.matrices(index).items():
            torch.testing.assert_close(shared.matrices(index)[name], matrix, rtol=1e-3, atol=1e-4)


# What is recorded


def test_the_recorded_error_is_that_of_held_back_tokens(
    build: Build, many: torch.Tensor, tmp_path: Path
) -> None:
    folder = build(model_type="llama")
    pruned = Pruned.open(by_stages(folder, many, tmp_path, options("refit"), propagate="one-shot").pruned)
    summary = json.loads((pruned.folder / SUMMARY).read_text())
    assert (summary["method"], summary["target"]) == ("refit", "layer")
    assert summary["decisions"][0]["damping"] in summary["dampings"]
    model = Checkpoint.open(folder).load_model(torch.float32)
    act_STF, ends_STH = layer_tensors(model, many[[7, 15]], 0)
    act_TF = (act_STF * token_scales(ends_STH)).flatten(0, 1).double()
    kept_K = only_kept(pruned)[0]
    weight_HF = model.model.layers[0].mlp.down_proj.weight.detach().double()
    plain = output_error(act_TF.T @ act_TF, weight_HF, kept_K, weight_HF[:, kept_K])
    assert summary["decisions"][0]["error_camera"] == pytest.approx(plain, rel=1e-4)
    assert summary["decisions"][0]["error"] < plain
