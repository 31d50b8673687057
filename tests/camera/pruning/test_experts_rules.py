"""Which channels and experts may go, what is said of idle experts, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import read_tensors, write_tensors
from camera.checkpoints.weights import INDEX_NAME
from camera.errors import CameraError
from camera.files import read_json, write_json
from camera.options import CaptureOptions, PruneOptions
from camera.pruning.folders import KEPT, SCORES, STATISTICS
from camera.pruning.plan import plan_prune
from camera.pruning.prune_checkpoint import prune_checkpoint
from camera.pruning.summary import SUMMARY
from tests.camera.pruning import naive
from tests.camera.pruning.conftest import PROPAGATIONS, change_tensors, logits
from tests.camera.pruning.moe_reference import Reference
from tests.camera.pruning.test_experts import load
from tests.tiny import MOE_TYPES, tiny_checkpoint, tiny_moe_checkpoint

ALPHA = 0.6
PRUNE = PruneOptions(ratio=0.3, reduce_ratio=ALPHA, multiple_of=4)
MASK_LAYER = PRUNE.model_copy(update={"mode": "mask", "scope": "layer"})
IDLE = 5


def prune_to(
    folder: Path, tokens_ST: torch.Tensor, out: Path, options: PruneOptions = PRUNE, **capture: Any
) -> dict[str, Any]:
    """Prune in one walk; what was found out, by name of the file."""
    found: dict[str, Any] = {}

    def look(model: Path, pruned: Path) -> None:
        for name in (KEPT, SCORES, STATISTICS):
            found[name] = {key: value.clone() for key, value in read_tensors(pruned / name).items()}
        for name in (SUMMARY, "scores.json"):
            found[name] = read_json(pruned / name)

    capturing = CaptureOptions(**{"device": "cpu", "batch_size": 2, **capture})
    prune_checkpoint(Checkpoint.open(folder), tokens_ST, out, capturing, options, finish=look)
    return found


# The whole layer together


@pytest.mark.parametrize("propagate", PROPAGATIONS)
@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek_v2", "olmoe"])
def test_a_layer_s_channels_are_ranked_together_and_masked(
    tokens: torch.Tensor, tmp_path: Path, model_type: str, propagate: str
) -> None:
    folder = tiny_moe_checkpoint(tmp_path / "model", model_type)
    found = prune_to(folder, tokens, tmp_path / "out", MASK_LAYER, propagate=propagate)
    reference = Reference(folder)
    kept_of_layers: list[dict[str, list[int]]] = []
    for layer in range(3):
        seen = reference.see(layer, tokens)
        blocks = {block.label: block for block in reference.checkpoint.blocks(layer)}
        if len(blocks) == 1:  # dense layers of a model with experts stay
            kept_of_layers.append({})
            continue
        scores = {
            label: reference.scores(layer, block, seen[label], ALPHA) for label, block in blocks.items()
        }
        ranked = [(label, channel) for label in scores for channel in range(len(scores[label]))]
        values = [scores[label][channel] for label, channel in ranked]
        equal = {label: -(-(len(scores[label]) - int(len(scores[label]) * 0.3)) // 4) * 4 for label in scores}
        for (
            label,
            block,
        ) in blocks.items():  # a shared network that is some times as wide keeps as many times more
            if block.times > 1:
                equal[label] = block.times * equal["experts.0"]
        best = [ranked[at] for at in naive.best(values, sum(equal.values()))]
        kept_of_layers.append({label: [channel for of, channel in best if of == label] for label in blocks})
        for label, wanted in kept_of_layers[-1].items():
            assert found[KEPT][f"layers.{layer}.{label}.kept"].tolist() == wanted
        if propagate == "sequential":
            reference.mask(layer, kept_of_layers[-1])
    if propagate == "one-shot":
        for layer, kept in enumerate(kept_of_layers):
            reference.mask(layer, kept)
    assert len({len(kept) for kept in kept_of_layers[-1].values()}) > 3, "experts keep differently many"
    assert Checkpoint.open(tmp_path / "out").config == Checkpoint.open(folder).config
    torch.testing.assert_close(
        logits(tmp_path / "out", tokens), reference.logits(tokens), rtol=1e-4, atol=2e-5
    )


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"scope": "layer"}, "scope `layer` goes with mode `mask`"),
        ({"scope": "layer", "mode": "mask", "method": "refit"}, "scope `layer` goes with mode `mask`"),
        ({"mode": "mask", "experts": 0.25}, "mode `mask` cannot drop experts"),
        ({"mode": "mask", "experts": "auto"}, "mode `mask` cannot drop experts"),
        ({"experts": 1.0}, "not at least 0 and below 1"),
        ({"experts": -0.1}, "not at least 0 and below 1"),
    ],
)
def test_what_nothing_could_load_is_refused_when_it_is_asked_for(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        PruneOptions(**options)


# Experts that no token, or hardly any, is routed to


def with_an_idle_expert(folder: Path) -> Path:
    """A checkpoint whose routers never send a token to one expert: its logit is 0, and of three pairs of opposite rows one
    each is above."""
    checkpoint = Checkpoint.open(tiny_moe_checkpoint(folder, "qwen3_moe"))
    routers = {}
    for layer in range(3):
        name = f"model.layers.{layer}.mlp.gate.weight"
        routers[name] = checkpoint.read(name).clone()
        routers[name][[1, 3, 6]] = -routers[name][[0, 2, 4]]
        routers[name][IDLE] = 0
    return change_tensors(folder, routers)


def test_an_idle_expert_is_ranked_by_its_weights_and_named(tokens: torch.Tensor, tmp_path: Path) -> None:
    folder = with_an_idle_expert(tmp_path / "model")
    found = prune_to(folder, tokens, tmp_path / "out", PRUNE.model_copy(update={"method": "refit"}))
    checkpoint, label = Checkpoint.open(folder), f"experts.{IDLE}"
    for layer in range(3):
        counted = found[STATISTICS][f"layers.{layer}.routed_tokens"].tolist()
        few = {f"experts.{expert}": count for expert, count in enumerate(counted) if count < 8}
        assert few[label] == 0
        assert found["scores.json"]["layers"][layer]["ranked_by_weights"] == few
        assert found[SUMMARY]["ranked_by_weights"][str(layer)] == few
        block = checkpoint.blocks(layer)[IDLE]
        gate_FH, up_FH, down_HF = (checkpoint.read(name).double().square() for name in block.names)
        product_F = gate_FH.sum(1) * up_FH.sum(1) * down_HF.sum(0)
        kept = found[KEPT][f"layers.{layer}.{label}.kept"].tolist()
        assert kept == naive.best(product_F.tolist(), len(kept))
        assert kept != list(range(len(kept)))


def test_a_refit_without_enough_tokens_falls_back_and_says_so(
    tokens: torch.Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = with_an_idle_expert(tmp_path / "model")
    for method in ("refit", "obs"):
        caplog.clear()
        with caplog.at_level("INFO"):
            found = prune_to(folder, tokens, tmp_path / method, PRUNE.model_copy(update={"method": method}))
        records = {(each["layer"], each["block"]): each for each in found[SUMMARY]["decisions"]}
        assert len(records) == 3 * 8
        for (layer, label), record in records.items():
            assert (record["method"], record["refitted"]) == ("camera", False)
            assert (
                "calibration tokens to fit are fewer than 4 for each of the 96 FFN channels"
                in record["fallback"]
            )
            assert f"decoder layer {layer}, {label}: {method} rejected" in caplog.text
        assert records[0, f"experts.{IDLE}"]["fit_tokens"] == 0


def test_an_idle_expert_is_the_first_to_be_dropped(tokens: torch.Tensor, tmp_path: Path) -> None:
    folder = with_an_idle_expert(tmp_path / "model")
    options = PRUNE.model_copy(update={"experts": 0.125})
    found = prune_to(folder, tokens, tmp_path / "out", options)
    for layer in range(3):
        assert found[KEPT][f"layers.{layer}.experts_kept"].tolist() == [0, 1, 2, 3, 4, 6, 7]


# What is written


def reshard(folder: Path, file_of: Any) -> Path:
    """The same checkpoint with its tensors in other files."""
    checkpoint = Checkpoint.open(folder)
    tensors = {name: checkpoint.read(name).clone() for name in checkpoint.tensors}
    for file in checkpoint.weight_files:
        (folder / file).unlink()
    weight_map = {name: file_of(name) for name in tensors}
    for file in set(weight_map.values()):
        write_tensors(folder / file, {name: tensors[name] for name in tensors if weight_map[name] == file})
    write_json(folder / INDEX_NAME, {"metadata": {"total_size": 1}, "weight_map": weight_map})
    return folder


def test_a_file_all_of_whose_experts_go_is_not_written(tokens: torch.Tensor, tmp_path: Path) -> None:
    folder = tiny_moe_checkpoint(tmp_path / "model", "mixtral")
    reshard(folder, lambda name: "last.safetensors" if "experts.7." in name else "rest.safetensors")
    (folder / "LICENSE").write_text("as you like")
    prune_to(folder, tokens, tmp_path / "out", PRUNE.model_copy(update={"experts": 0.25}))
    written = Checkpoint.open(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").glob("*.safetensors")} == {"rest.safetensors"}
    index = read_json(tmp_path / "out" / INDEX_NAME)
    assert set(index["weight_map"]) == set(written.tensors)
    assert index["metadata"]["total_size"] == sum(info.size_bytes for info in written.tensors.values())
    assert written.side_files == Checkpoint.open(folder).side_files
    _, info = load(tmp_path / "out")
    assert not any(info.values())


@pytest.mark.parametrize(
    "keys", [("num_experts",), ("num_local_experts",), ("num_experts", "num_local_experts")]
)
def test_the_number_of_experts_changes_under_the_key_that_the_source_gives_it_by(
    tokens: torch.Tensor, tmp_path: Path, keys: tuple[str, ...]
) -> None:
    folder = tiny_moe_checkpoint(tmp_path / "model", "qwen3_moe")
    config = read_json(folder / "config.json")
    for key in ("num_experts", "num_local_experts"):
        config.pop(key, None)
    write_json(folder / "config.json", config | dict.fromkeys(keys, 8))
    prune_to(folder, tokens, tmp_path / "out", PRUNE.model_copy(update={"experts": 0.25}))
    changed = read_json(tmp_path / "out" / "config.json")
    assert changed == config | dict.fromkeys(keys, 6) | {"moe_intermediate_size": 68}
    _, info = load(tmp_path / "out")
    assert not any(info.values())


@pytest.mark.parametrize("model_type", MOE_TYPES)
def test_in_half_precision_every_tensor_keeps_its_dtype_and_those_that_do_not_change_their_bytes(
    tokens: torch.Tensor, tmp_path: Path, model_type: str
) -> None:
    folder = tiny_moe_checkpoint(tmp_path / "model", model_type, dtype=torch.bfloat16)
    found = prune_to(folder, tokens, tmp_path / "out", PRUNE.model_copy(update={"multiple_of": 8}))
    source, written = Checkpoint.open(folder), Checkpoint.open(tmp_path / "out")
    assert written.tensors.keys() == source.tensors.keys()
    cut = {}
    for layer in range(source.layer_count):
        for block in source.blocks(layer):
            start = f"layers.{layer}." + (f"{block.label}." if block.label else "")
            cut |= dict.fromkeys(block.names, found[KEPT][f"{start}kept"])
    for name in source.tensors:
        before, after = source.read(name), written.read(name)
        assert after.dtype == before.dtype
        if name in cut:
            before = before.index_select(
                1 if name.endswith(("down_proj.weight", "w2.weight")) else 0, cut[name]
            )
        assert torch.equal(after, before), name
    _, info = load(tmp_path / "out")
    assert not any(info.values())


@pytest.mark.parametrize("model_type", ["deepseek_v3", "glm4_moe"])
def test_layers_that_predict_further_tokens_go_and_the_config_says_so(
    tokens: torch.Tensor, tmp_path: Path, model_type: str
) -> None:
    folder = tiny_moe_checkpoint(tmp_path / "model", model_type)
    config = read_json(folder / "config.json")
    checkpoint = Checkpoint.open(folder)
    beyond = {
        name.replace("layers.2.", "layers.3."): checkpoint.read(name).clone()
        for name in checkpoint.tensors
        if name.startswith("model.layers.2.")
    } | {"model.layers.3.eh_proj.weight": torch.ones(64, 128)}
    change_tensors(folder, beyond)
    write_json(folder / "config.json", config | {"num_nextn_predict_layers": 1})
    prune_to(folder, tokens, tmp_path / "out")
    written = Checkpoint.open(tmp_path / "out")
    assert written.tensors.keys() == checkpoint.tensors.keys()
    assert written.config["num_nextn_predict_layers"] == 0
    _, info = load(tmp_path / "out")
    assert not any(info.values())


# What cannot be pruned


def bad(folder: Path, change: str) -> Path:
    """A checkpoint with something wrong."""
    checkpoint = Checkpoint.open(tiny_moe_checkpoint(folder, "qwen3_moe"))
    tensors = {name: checkpoint.read(name).clone() for name in checkpoint.tensors}
    expert = "model.layers.1.mlp.experts.3.up_proj.weight"
    if change == "missing":
        del tensors[expert]
    elif change == "router":
        tensors["model.layers.1.mlp.gate.weight"] = torch.ones(7, 64)
    elif change == "shape":
        tensors[expert] = tensors[expert][:95]
    elif change == "nan":
        tensors[expert][3, 4] = torch.nan
    elif change == "huge":
        tensors[expert] *= 1e30
    write_tensors(folder / "model.safetensors", tensors)
    return folder


@pytest.mark.parametrize("share", [0.0, 0.25])
@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("missing", r"no tensor model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight"),
        ("router", r"decoder layer 1 does not load: .*gate\.weight"),
        ("shape", r"model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight has shape \[95, 64\]"),
        ("nan", r"model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight holds NaN or infinity"),
        ("huge", r"decoder layer 1, experts\.3"),
    ],
)
def test_damage_is_named(tokens: torch.Tensor, tmp_path: Path, change: str, why: str, share: float) -> None:
    folder = bad(tmp_path / "model", change)
    with pytest.raises(CameraError, match=f"(?s){why}"):
        prune_to(folder, tokens, tmp_path / "out", PRUNE.model_copy(update={"experts": share}))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model_type", "keys", "options", "why"),
    [
        ("qwen3_moe", {}, {"experts": 0.75}, "leaves 2 of 8 experts, and the router needs 3"),
        ("qwen3_moe", {}, {"experts": 0.05}, "drops none: raise it"),
        ("deepseek_v3", {"n_group": 4}, {"experts": 0.25}, "8 experts in 4 groups of the router drops none"),
        ("deepseek_v3", {"n_group": 4}, {"experts": 0.5}, "leaves 4 of 8 experts, and the router needs 8"),
        ("qwen3_moe", {"dtype": torch.bfloat16}, {}, "keep 68 channels .* multiple of 8 in bfloat16"),
        ("PanguProMoE", {}, {"experts": 0.1}, "in 2 groups of the router drops none"),
        ("qwen3_moe", {}, {"ratio": 0.1, "multiple_of": 64}, "nothing would be pruned"),
        (
            "qwen3_moe",
            {},
            {"ratio": 0.3, "multiple_of": 5},
            "keep 70 channels .* multiple of 4 in float32: set prune.multiple_of to 4",
        ),
        ("qwen2_moe", {}, {"ratio": 0.3, "multiple_of": 128}, "nothing would be pruned"),
        (None, {}, {"experts": 0.25}, "has no experts to drop"),
        (None, {}, {"experts": "auto"}, "has no experts to drop"),
    ],
)
def test_what_is_impossible_is_said_before_anything_is_computed(
    tmp_path: Path, model_type: str | None, keys: dict[str, Any], options: dict[str, Any], why: str
) -> None:
    make = tiny_checkpoint if model_type is None else tiny_moe_checkpoint
    folder = make(tmp_path / "model", model_type or "llama", **keys)
    asked = PruneOptions(**{"ratio": 0.3, "multiple_of": 4, **options})
    with pytest.raises(CameraError, match=why):
        plan_prune(Checkpoint.open(folder), CaptureOptions(), asked)
