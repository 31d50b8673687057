"""A recipe of a mixture of experts: estimated, run, cached and compared."""

import time
from pathlib import Path

import pytest

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import write_tensors
from camera.files import read_json
from camera.pruning.summary import Pruned
from tasks.diff import compare
from tasks.estimate import Known
from tasks.pipeline import Pipeline, build_pipeline
from tasks.preflight import plan
from tasks.sources import find_sources
from tasks.stage import perform
from tasks.store import LINEAGE, Artifact, Store
from tests.tasks.conftest import MakeRecipe
from tests.tiny import tiny_moe_checkpoint

QUANTIZE = {"type": "q4_0"}


def build(recipe: MakeRecipe, model: Path, name: str = "tiny", **prune: object) -> Pipeline:
    asked = {"ratio": 0.4, "multiple_of": 16, **prune}
    checked = recipe(
        name=name, model=str(model), prune=asked, quantize=QUANTIZE, capture={"propagate": "one-shot"}
    )
    return build_pipeline(checked, find_sources(checked))


def run(pipeline: Pipeline, store: Store, last: str) -> dict[str, Artifact]:
    done: dict[str, Artifact] = {}
    for step in pipeline.steps:
        done[step.name] = perform(store, step.request(done))
        if step.name == last:
            break
    return done


@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek_v2"])
@pytest.mark.parametrize("experts", [0.25, "auto"])
def test_the_estimates_are_near_what_is_then_written(
    recipe: MakeRecipe, store: Store, tmp_path: Path, model_type: str, experts: float | str
) -> None:
    pipeline = build(recipe, tiny_moe_checkpoint(tmp_path / "moe", model_type), experts=experts)
    estimates = {planned.step.name: planned.disk_bytes for planned in plan(pipeline, store)}
    done = run(pipeline, store, "convert baseline")
    for name in ("save", "quantize", "quantize baseline"):
        weights = sum(path.stat().st_size for path in done[name].path.glob("*.safetensors"))
        assert estimates[name] == pytest.approx(weights, rel=0.25), name


def test_a_mask_is_estimated_at_the_size_of_the_original(
    recipe: MakeRecipe, store: Store, tmp_path: Path
) -> None:
    pipeline = build(recipe, tiny_moe_checkpoint(tmp_path / "moe"), mode="mask", scope="layer")
    estimates = {planned.step.name: planned.disk_bytes for planned in plan(pipeline, store)}
    needed = pipeline.sources.checkpoint.needed.values()
    assert estimates["save"] == sum(info.size_bytes for info in needed)


def test_dense_layers_and_what_experts_share_are_counted_apart(recipe: MakeRecipe, tmp_path: Path) -> None:
    """Layer 0 is dense and stays; in the others two of eight experts go, and a third of all channels."""
    model = tiny_moe_checkpoint(tmp_path / "moe", "deepseek_v2")
    pipeline = build(recipe, model, experts=0.25, ratio=0.34, multiple_of=32)
    known = Known(pipeline.recipe, pipeline.sources.checkpoint)
    matrix = 3 * 64 * 4  # bytes of a channel
    assert known.feed_forward == matrix * (192 + 2 * (8 * 96 + 2 * 96))
    assert known.kept_bytes == matrix * 192 + 2 * matrix * (6 * 64 + 2 * 64)
    assert known.channels == 192 + 2 * (8 * 96 + 2 * 96)


def test_a_layer_is_counted_with_one_expert_at_a_time(recipe: MakeRecipe, tmp_path: Path) -> None:
    model = tiny_moe_checkpoint(tmp_path / "moe")
    pipeline = build(recipe, model)
    source = pipeline.sources.checkpoint
    layer = sum(source.tensors[name].size_bytes for name in source.layer_tensors(0))
    assert Known(pipeline.recipe, source).layer == layer - 7 * 3 * 96 * 64 * 4


def test_a_model_that_is_measured_layer_by_layer_needs_no_memory_for_its_experts(
    recipe: MakeRecipe, store: Store, tmp_path: Path
) -> None:
    model = tiny_moe_checkpoint(tmp_path / "moe", num_experts=64)

    def memory(layer_by_layer: bool) -> dict[str, int]:
        text = {"window": 8, "max_windows": 2, "layer_by_layer": layer_by_layer}
        checked = recipe(
            model=str(model), prune={"ratio": 0.4, "multiple_of": 16}, quantize=QUANTIZE, evaluate=text
        )
        pipeline = build_pipeline(checked, find_sources(checked))
        return {planned.step.name: planned.memory_bytes for planned in plan(pipeline, store)}

    whole, layers = memory(False), memory(True)
    weights = sum(info.size_bytes for info in Checkpoint.open(model).needed.values())
    for name in ("original", "pruned", "baseline"):
        assert whole[f"evaluate {name} story"] - layers[f"evaluate {name} story"] > weights / 2


def test_thousands_of_experts_are_estimated_in_seconds(recipe: MakeRecipe, tmp_path: Path) -> None:
    """As many tensors as Qwen3-30B-A3B has, each tiny."""
    layers, experts = 48, 128
    model = tiny_moe_checkpoint(
        tmp_path / "moe", layers=2, num_experts=4, moe_intermediate_size=16, num_experts_per_tok=2
    )
    few = Checkpoint.open(model)
    tensors = {name: few.read(name).clone() for name in few.tensors}
    for name in few.tensors:
        if few.family.layer_of(name) is not None:
            del tensors[name]
    first = {name: few.read(name).clone() for name in few.layer_tensors(0)}
    for layer in range(layers):
        for name, tensor in first.items():
            if ".experts." not in name:
                whole = tensor.repeat(experts // 4, 1) if ".gate." in name else tensor
                tensors[name.replace(".0.", f".{layer}.", 1)] = whole
        for role in ("gate", "up", "down"):
            one = first[f"model.layers.0.mlp.experts.0.{role}_proj.weight"]
            tensors |= {
                f"model.layers.{layer}.mlp.experts.{expert}.{role}_proj.weight": one
                for expert in range(experts)
            }
    write_tensors(model / "model.safetensors", tensors)
    config = (model / "config.json").read_text(encoding="utf-8")
    config = config.replace('"num_experts": 4', f'"num_experts": {experts}')
    config = config.replace('"num_hidden_layers": 2', f'"num_hidden_layers": {layers}')
    (model / "config.json").write_text(config, encoding="utf-8")
    assert len(Checkpoint.open(model).tensors) > 18_000
    pipeline = build(recipe, model, ratio=0.5, experts="auto", multiple_of=4)
    started = time.process_time()
    for step in pipeline.steps:
        step.stage.needs(
            Known(
                pipeline.recipe,
                pipeline.sources.checkpoint,
                step.options,
                dict.fromkeys(step.inputs, 1 << 20),
            )
        )
    assert time.process_time() - started < 20


def test_another_budget_is_another_capture_where_it_is_split(
    recipe: MakeRecipe, store: Store, tmp_path: Path
) -> None:
    """Two ratios whose widest splits are alike, and others are not."""
    model = tiny_moe_checkpoint(tmp_path / "moe")

    def key(ratio: float) -> str:
        pipeline = build(recipe, model, ratio=ratio, experts="auto")
        done = run(pipeline, store, "fetch calibration")
        return next(step for step in pipeline.steps if step.name == "capture").request(done).key

    assert key(0.34) != key(0.48)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "qwen2_moe", "deepseek_v2"])
def test_a_split_run_keeps_what_capture_chose_and_is_cached(
    recipe: MakeRecipe, store: Store, tmp_path: Path, model_type: str
) -> None:
    model = tiny_moe_checkpoint(tmp_path / "moe", model_type)
    pipeline = build(recipe, model, experts="auto", method="refit")
    done = run(pipeline, store, "report")
    pruned = Pruned.open(done["prune"].path)
    saved = Checkpoint.open(done["save"].path)
    assert (saved.expert_count, saved.ffn_width) == (pruned.experts_kept, pruned.width)
    outcome = {"experts_kept": pruned.experts_kept, "kept_width": pruned.width}
    (entry,) = [
        entry
        for entry in read_json(done["save"].path / LINEAGE)["stages"].values()
        if entry["stage"] == "prune"
    ]
    assert entry["outcome"] == {**outcome, "removed_share": pruned.removed_share}
    again = {planned.step.name: planned.state for planned in plan(pipeline, store)}
    assert {again[name] for name in done} == {"cached"}


@pytest.mark.slow
def test_two_published_mixtures_are_compared_expert_by_expert(
    recipe: MakeRecipe, store: Store, tmp_path: Path
) -> None:
    model = tiny_moe_checkpoint(tmp_path / "moe")
    for name, ratio in (("first", 0.3), ("second", 0.5)):
        run(build(recipe, model, name, ratio=ratio), store, "publish")
    found = compare(tmp_path / "published" / "first", tmp_path / "published" / "second", store)
    assert found.no_overlap is None
    assert [(layer.before, layer.after, layer.both) for layer in found.overlap] == [
        (8 * 80, 8 * 48, 8 * 48)
    ] * 3
    assert {change.what for change in found.changes if change.section == "size"} == {"bytes", "FFN channels"}
