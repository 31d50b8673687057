"""The pipeline of a recipe is a plan: which steps there are, what each reads, and what decides its key."""

import types
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import read_tensors
from camera.errors import CameraError
from camera.files import read_json
from camera.options import QuantizeOptions
from camera.pruning.summary import Pruned
from tasks.pipeline import Pipeline, build_pipeline, dataset_label
from tasks.plan import execute
from tasks.recipe import PublishOptions, Recipe
from tasks.sources import find_sources
from tasks.stage import Request, Step, perform
from tasks.stages.capture import DecideOptions
from tasks.stages.convert import ConvertOptions
from tasks.stages.publish import PublicationOptions
from tasks.stages.save import SaveOptions
from tasks.store import Artifact, Store
from tests.tasks.conftest import MakeRecipe, flip

STEPS = """
fetch calibration, capture, score, prune, save, quantize, convert, quantize baseline, convert baseline,
fetch story, evaluate original story, evaluate baseline story, evaluate pruned story,
evaluate pruned+quantized story, benchmark, report, publish
"""


def build(recipe: Recipe) -> Pipeline:
    return build_pipeline(recipe, find_sources(recipe))


def names(pipeline: Pipeline) -> list[str]:
    return [step.name for step in pipeline.steps]


def keys(pipeline: Pipeline) -> dict[str, str]:
    """The key of every step if each artifact's digest were its key: equal keys mean that nothing before differs."""
    done: dict[str, Artifact] = {}

    def pretend(step: Step, request: Request) -> Artifact:
        manifest = {"stage": request.stage.name, "key": request.key, "digest": request.key}
        done[step.name] = Artifact(Path("nowhere"), manifest)
        return done[step.name]

    execute(pipeline, pretend)
    return {name: artifact.key for name, artifact in done.items()}


def changed(recipe: MakeRecipe, before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    """Names of the steps whose key differs between two recipes; those before them are the same."""
    first, second = keys(build(recipe(**before))), keys(build(recipe(**after)))
    assert set(first) == set(second)
    return {name for name in first if first[name] != second[name]}


def test_the_steps_of_a_recipe_are_these_in_this_order(recipe: MakeRecipe) -> None:
    assert names(build(recipe())) == [name.strip() for name in STEPS.replace("\n", " ").split(",")]


def test_the_baseline_is_packed_where_the_pruned_model_is(recipe: MakeRecipe) -> None:
    steps = {step.name: step for step in build(recipe(quantize={"device": "cpu"})).steps}
    assert {steps[name].options["quantize"].device for name in ("quantize", "quantize baseline")} == {"cpu"}


def test_every_step_needs_only_earlier_ones(recipe: MakeRecipe) -> None:
    done: set[str] = set()
    for step in build(recipe()).steps:
        assert set(step.needs) <= done, step.name
        assert step.name not in done
        done.add(step.name)


def test_a_step_reads_what_it_is_about(recipe: MakeRecipe) -> None:
    pipeline = build(recipe())
    steps = {step.name: step for step in pipeline.steps}
    assert steps["capture"].inputs == {"model": pipeline.sources.model, "calibration": "fetch calibration"}
    assert steps["convert"].inputs == {"quantized": "quantize"}
    assert steps["fetch calibration"].inputs["tokenizer"] == pipeline.sources.tokenizer
    assert steps["benchmark"].needs == ["convert baseline", "save", "convert"]
    assert steps["publish"].needs == ["save", "convert", "report", "prune"]


def test_the_baseline_is_the_unpruned_model_in_steps_of_its_own(recipe: MakeRecipe) -> None:
    pipeline = build(recipe(baseline="q8_0"))
    steps = {step.name: step for step in pipeline.steps}
    assert steps["quantize baseline"].inputs == {"model": pipeline.sources.model}
    assert steps["quantize baseline"].options.of(QuantizeOptions).type == "q8_0"
    assert steps["convert baseline"].inputs == {"quantized": "quantize baseline"}
    assert steps["convert baseline"].options.of(ConvertOptions).name == "model-unpruned-q8_0"


def test_publishing_can_be_left_out(recipe: MakeRecipe) -> None:
    assert names(build(recipe(publish={"enabled": False})))[-1] == "report"


def test_every_text_is_fetched_once_and_measured_on_four_models(recipe: MakeRecipe, text: Path) -> None:
    datasets = [{"name": "file", "path": str(text)}, {"name": "stdlib", "split": "test"}]
    found = names(build(recipe(evaluate={"datasets": datasets})))
    assert [name for name in found if name.startswith("fetch")] == [
        "fetch calibration",
        "fetch story",
        "fetch stdlib-test",
    ]
    assert len([name for name in found if name.startswith("evaluate")]) == 8


@pytest.mark.parametrize(
    ("datasets", "label"),
    [
        ([{"name": "stdlib", "split": "test"}] * 2, "stdlib-test"),
        ([{"name": "file", "path": "a/x.txt"}, {"name": "file", "path": "b/x.jsonl"}], "x"),
        ([{"name": "stdlib", "split": "test"}, {"name": "file", "path": "stdlib-test.txt"}], "stdlib-test"),
        ([{"name": "file", "path": "calibration.txt"}], "calibration"),
    ],
)
def test_two_texts_of_one_name_are_refused(
    recipe: MakeRecipe,
    datasets: list[dict[str, Any]],
    label: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for dataset in datasets:
        if "path" in dataset:
            path = tmp_path / dataset["path"]
            path.parent.mkdir(exist_ok=True)
            path.write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CameraError, match=rf"evaluate\.datasets: .*{label}"):
        build(recipe(evaluate={"datasets": datasets}))


def test_a_text_is_called_after_its_file_or_its_dataset(recipe: MakeRecipe) -> None:
    found = recipe(
        evaluate={
            "datasets": [{"name": "file", "path": "texts/My story.v2.txt"}, {"name": "c4", "split": "test"}]
        }
    )
    assert [dataset_label(dataset) for dataset in found.evaluate.datasets] == ["My_story.v2", "c4-test"]


PRUNING = {"prune", "save", "quantize", "convert", "benchmark", "report", "publish"}
PRUNING |= {"evaluate pruned story", "evaluate pruned+quantized story"}


def test_a_one_shot_capture_serves_every_ratio(recipe: MakeRecipe) -> None:
    capture = {"propagate": "one-shot"}
    found = changed(recipe, {"capture": capture}, {"capture": capture, "prune": {"ratio": 0.7}})
    assert found == PRUNING


def test_a_one_shot_capture_serves_every_reduce_ratio(recipe: MakeRecipe) -> None:
    capture = {"propagate": "one-shot"}
    found = changed(recipe, {"capture": capture}, {"capture": capture, "prune": {"reduce_ratio": 0.5}})
    assert found == PRUNING | {"score"}


@pytest.mark.parametrize("prune", [{"ratio": 0.7}, {"reduce_ratio": 0.5}])
def test_a_sequential_capture_depends_on_what_is_pruned(recipe: MakeRecipe, prune: dict[str, Any]) -> None:
    assert changed(recipe, {}, {"prune": prune}) == PRUNING | {"capture", "score"}


def test_a_sequential_capture_serves_every_ratio_of_the_same_width(recipe: MakeRecipe) -> None:
    assert "capture" not in changed(recipe, {}, {"prune": {"ratio": 0.36}})
    assert "capture" not in changed(recipe, {}, {"prune": {"mode": "mask", "multiple_of": 64}})


def test_the_type_changes_what_is_quantised_and_after(recipe: MakeRecipe) -> None:
    assert changed(recipe, {}, {"quantize": {"type": "q4_0"}}) == {
        "quantize",
        "convert",
        "evaluate pruned+quantized story",
        "benchmark",
        "report",
        "publish",
    }


def test_a_twin_does_not_quantise_again(recipe: MakeRecipe) -> None:
    found = changed(recipe, {}, {"quantize": {"twin": "q4_0"}})
    assert found == {"convert", "benchmark", "report", "publish"}


QUANTIZING = {"quantize", "convert", "evaluate pruned+quantized story", "benchmark", "report", "publish"}


@pytest.mark.parametrize("method", ["search", "gptq"])
def test_a_method_that_calibrates_reads_the_calibration_and_leaves_the_baseline(
    recipe: MakeRecipe, method: str
) -> None:
    assert changed(recipe, {}, {"quantize": {"method": method}}) == QUANTIZING
    pipeline = build(recipe(quantize={"method": method, "device": "cpu"}))
    steps = {step.name: step for step in pipeline.steps}
    assert steps["quantize"].inputs == {"model": "save", "calibration": "fetch calibration"}
    assert steps["quantize baseline"].inputs == {"model": pipeline.sources.model}
    assert "method" not in steps["quantize baseline"].options.identity()["quantize"]


def test_rounding_to_nearest_has_no_options_of_calibration_in_its_key(recipe: MakeRecipe) -> None:
    (step,) = (step for step in build(recipe()).steps if step.name == "quantize")
    assert step.options.identity()["quantize"].keys() == {
        "type",
        "output_type",
        "embedding_type",
        "overrides",
    }
    assert step.inputs == {"model": "save"}
    found = changed(recipe, {}, {"quantize": {"damping": 0.1, "dtype": "auto", "batch_size": 1}})
    assert found == {"report", "publish"}


def test_how_gptq_calibrates_changes_what_is_quantised(recipe: MakeRecipe) -> None:
    gptq = {"method": "gptq"}
    assert changed(recipe, {"quantize": gptq}, {"quantize": {**gptq, "damping": 0.1}}) == QUANTIZING
    batches = {"quantize": {**gptq, "batch_size": 1}}
    assert changed(recipe, {"quantize": gptq}, batches) == {"report", "publish"}


def test_how_quality_is_measured_changes_nothing_that_is_made(recipe: MakeRecipe) -> None:
    found = changed(recipe, {}, {"evaluate": {"max_windows": 3}})
    evaluations = {
        f"evaluate {model} story" for model in ("original", "baseline", "pruned", "pruned+quantized")
    }
    assert found == evaluations | {"report", "publish"}


def test_text_to_read_is_written_by_four_models_in_steps_of_its_own(recipe: MakeRecipe) -> None:
    asked = build(recipe(evaluate={**recipe().evaluate.model_dump(), "samples": 8}))
    added = [name for name in names(asked) if name not in names(build(recipe()))]
    assert added == [f"sample {model}" for model in ("original", "baseline", "pruned", "pruned+quantized")]


def test_how_speed_is_measured_changes_nothing_that_is_made(recipe: MakeRecipe) -> None:
    assert changed(recipe, {}, {"benchmark": {"repeats": 2}}) == {"benchmark", "report", "publish"}


def test_the_baselines_type_leaves_the_pruned_model(recipe: MakeRecipe) -> None:
    assert changed(recipe, {}, {"baseline": "q8_0"}) == {
        "quantize baseline",
        "convert baseline",
        "evaluate baseline story",
        "benchmark",
        "report",
        "publish",
    }


def test_where_it_is_published_changes_only_publishing(recipe: MakeRecipe) -> None:
    assert changed(recipe, {}, {"publish": {"alias": "champion"}}) == {"publish"}


def test_the_calibration_changes_all_that_hangs_on_importance(recipe: MakeRecipe) -> None:
    found = changed(recipe, {}, {"calibration": {"seed": 1}})
    assert found == PRUNING | {"fetch calibration", "capture", "score"}


@pytest.mark.parametrize(
    "how",
    [
        {"capture": {"batch_size": 1}},
        {"capture": {"devices": 2}},
        {"evaluate": {"batch_size": 1}},
        {"benchmark": {"device": "auto"}},
    ],
)
def test_how_it_is_computed_changes_only_the_report_that_shows_the_recipe(
    recipe: MakeRecipe, how: dict[str, Any]
) -> None:
    assert changed(recipe, {}, how) == {"report", "publish"}
    [(section, values)] = how.items()
    [(field, value)] = values.items()
    found = [step.options[section] for step in build(recipe(**how)).steps if step.name.startswith(section)]
    assert found
    assert all(getattr(options, field) == value for options in found)


def test_publishing_by_another_path_to_the_same_folder_is_the_same(
    recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = str(tmp_path / "published")
    first, second = (
        {step.name: step for step in build(recipe(publish={"folder": given})).steps}["publish"].options.of(
            PublishOptions
        )
        for given in (folder, "published")
    )
    assert first.folder == second.folder
    assert changed(recipe, {}, {"publish": {"folder": "elsewhere"}}) == {"publish"}


def test_another_model_changes_all_but_the_texts(recipe: MakeRecipe, model: Path) -> None:
    before = keys(build(recipe()))
    flip(model / "model.safetensors")
    after = keys(build(recipe()))
    assert {name for name in before if before[name] == after[name]} == {"fetch calibration", "fetch story"}


def test_editing_a_models_readme_makes_only_its_copy_anew(recipe: MakeRecipe, model: Path) -> None:
    pipeline = build(recipe())
    before = {step.name: step.inputs for step in pipeline.steps}
    (model / "README.md").write_text("Now with a licence.")
    after = {step.name: step.inputs for step in build(recipe()).steps}
    changed = [name for name in after if digests(after[name]) != digests(before[name])]
    assert changed == ["save"]


def digests(inputs: Mapping[str, Any]) -> dict[str, str]:
    return {name: given if isinstance(given, str) else given.digest for name, given in inputs.items()}


def test_a_model_that_moved_changes_no_key_of_what_is_made(
    recipe: MakeRecipe, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = keys(build(recipe()))
    elsewhere = model.parent / "elsewhere"
    elsewhere.mkdir()
    model.rename(elsewhere / model.name)
    made = {"capture", "score", "prune", "save", "quantize", "convert", "benchmark"}
    monkeypatch.chdir(elsewhere)
    for path in (elsewhere / model.name, f"../elsewhere/{model.name}", f"{model.name}/", model.name):
        after = keys(build(recipe(model=str(path))))
        assert {name for name in made if before[name] != after[name]} == set()


def test_a_folder_is_never_taken_for_a_hub_id(
    recipe: MakeRecipe, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model.parent.parent)
    steps = {step.name: step for step in build(recipe(model=f"{model.parent.name}/model")).steps}
    assert steps["save"].options.of(SaveOptions).base_model == "model"
    assert steps["publish"].options.of(PublicationOptions).base_model == "model"


def test_the_runs_key_follows_what_is_asked_and_what_is_given(recipe: MakeRecipe, model: Path) -> None:
    plain = build(recipe()).key
    assert build(recipe()).key == plain
    assert build(recipe(tracking={"experiment": "other"})).key == plain
    assert build(recipe(name="other")).key != plain
    assert build(recipe(prune={"ratio": 0.7})).key != plain
    assert build(recipe(evaluate={"window": 32})).key != plain
    flip(model / "model.safetensors")
    assert build(recipe()).key != plain


def test_the_runs_key_follows_a_stages_version(recipe: MakeRecipe) -> None:
    pipeline = build(recipe())
    newer = [replace(step, stage=replace(step.stage, version=99)) for step in pipeline.steps[:1]]
    assert replace(pipeline, steps=newer + pipeline.steps[1:]).key != pipeline.key


def test_a_recipe_that_would_prune_nothing_is_refused_before_anything_runs(recipe: MakeRecipe) -> None:
    with pytest.raises(CameraError, match="nothing would be pruned"):
        build(recipe(prune={"ratio": 0.2}))


def test_a_device_that_is_not_there_is_refused_before_anything_runs(recipe: MakeRecipe) -> None:
    with pytest.raises(CameraError, match="npu"):
        build(recipe(capture={"device": "npu"}))


def run_until(
    last: str, pipeline: Pipeline, store: Store, ran: list[str] | None = None
) -> Mapping[str, Artifact]:
    done: dict[str, Artifact] = {}
    for step in pipeline.steps:
        request = step.request(done)
        started = (lambda: None) if ran is None else (lambda name=step.name: ran.append(name))
        done[step.name] = perform(store, request, started=started)
        if step.name == last:
            break
    return done


def test_gptq_rounds_a_pruned_checkpoint_for_the_calibration(recipe: MakeRecipe, store: Store) -> None:
    pipeline = build(recipe(quantize={"type": "q4_0", "method": "gptq", "device": "cpu"}))
    summary = read_json(run_until("quantize", pipeline, store)["quantize"].path / "quantized.json")
    losses = [tensor["weighted_error"] for tensor in summary["tensors"] if "_proj.weight" in tensor["name"]]
    assert losses
    assert all(0 < loss < 0.2 for loss in losses)


@pytest.mark.parametrize("propagate", ["one-shot", "sequential"])
def test_the_first_stages_prune_a_real_checkpoint(recipe: MakeRecipe, store: Store, propagate: str) -> None:
    pipeline = build(recipe(capture={"propagate": propagate}))
    ran: list[str] = []
    done = run_until("save", pipeline, store, ran)
    assert ran == ["fetch calibration", "capture", "score", "prune", "save"]
    tokens = read_tensors(done["fetch calibration"].path / "tokens.safetensors")["input_ids"]
    assert tuple(tokens.shape) == (3, 32)
    assert read_json(done["capture"].path / "capture.json")["propagate"] == propagate
    pruned = Pruned.open(done["prune"].path)
    assert (pruned.width, pruned.layers) == (128, 2)
    assert done["prune"].metrics["kept_width"] == 128
    assert done["prune"].metrics["removed_share"] == pytest.approx(1 / 3)
    assert 0.5 < done["prune"].metrics["importance_kept_mean"] < 1
    assert done["capture"].metrics == {"tokens": 96}
    saved = Checkpoint.open(done["save"].path)
    assert saved.ffn_width == 128
    with torch.no_grad():
        assert torch.isfinite(saved.load_model(torch.float32)(tokens).logits).all()
    again: list[str] = []
    assert run_until("save", pipeline, store, again) == done
    assert again == []


def test_the_options_of_the_original_method_are_the_key_of_a_plain_prune(recipe: MakeRecipe) -> None:
    step = next(
        step for step in build(recipe(prune={"damping": 0.5, "round": 3})).steps if step.name == "prune"
    )
    found = step.options.identity()["prune"]
    assert {name: found[name] for name in ("ratio", "reduce_ratio", "mode", "multiple_of")} == {
        "ratio": 0.35, "reduce_ratio": 0.95, "mode": "physical", "multiple_of": 64,
    }  # fmt: skip
    assert not {"damping", "round"} & found.keys()


@pytest.mark.parametrize("prune", [{"method": "refit"}, {"method": "obs"}, {"sparsity": 0.5}])
def test_a_method_that_needs_the_activations_decides_in_capture(
    recipe: MakeRecipe, prune: dict[str, Any]
) -> None:
    pipeline = build(recipe(prune=prune, capture={"propagate": "one-shot"}))
    steps = {step.name: step for step in pipeline.steps}
    assert steps["capture"].options.of(DecideOptions).kept == 128
    assert steps["prune"].inputs["captured"] == "capture"
    assert steps["report"].inputs["capture"] == "capture"


def test_a_one_shot_capture_decides_nothing(recipe: MakeRecipe) -> None:
    steps = {step.name: step for step in build(recipe(capture={"propagate": "one-shot"})).steps}
    assert "decide" not in steps["capture"].options


def test_a_decision_depends_on_what_it_uses(recipe: MakeRecipe) -> None:
    refit = {"prune": {"method": "refit"}}
    decided = PRUNING | {"capture", "score"}
    assert changed(recipe, refit, {"prune": {"method": "refit", "damping": 0.01}}) == decided
    assert changed(recipe, refit, {"prune": {"method": "obs"}}) == decided
    assert changed(recipe, refit, {**refit, "capture": {"propagate": "one-shot"}}) == decided
    assert not changed(recipe, refit, {"prune": {"method": "refit", "round": 5}}) - {"report", "publish"}
    assert "capture" not in changed(recipe, refit, {**refit, "capture": {"batch_size": 1}})


def test_a_method_beyond_cameras_makes_a_model_that_computes(recipe: MakeRecipe, store: Store) -> None:
    calibration = {"samples": 16, "length": 64}
    pipeline = build(recipe(prune={"method": "obs"}, calibration=calibration))
    ran: list[str] = []
    done = run_until("save", pipeline, store, ran)
    assert ran == ["fetch calibration", "capture", "score", "prune", "save"]
    assert done["prune"].metrics["kept_width"] == 128
    assert done["prune"].metrics["refitted_layers"] == 2
    tokens = read_tensors(done["fetch calibration"].path / "tokens.safetensors")["input_ids"]
    with torch.no_grad():
        logits = Checkpoint.open(done["save"].path).load_model(torch.float32)(tokens).logits
    assert torch.isfinite(logits).all()


def test_a_damaged_stage_of_a_real_run_is_made_again_and_nothing_after_it(
    recipe: MakeRecipe, store: Store
) -> None:
    pipeline = build(recipe())
    first = run_until("save", pipeline, store)
    flip(first["score"].path / next(iter(first["score"].manifest["files"])))
    ran: list[str] = []
    second = run_until("save", pipeline, store, ran)
    assert ran == ["score"]
    assert {name: made.digest for name, made in second.items()} == {
        name: made.digest for name, made in first.items()
    }


def test_another_build_of_llama_cpp_is_measured_again(recipe: MakeRecipe, tmp_path: Path) -> None:
    binary = tmp_path / "llama-bench"
    binary.write_text("one")
    binary.chmod(0o755)
    asked = {"engines": ["llama.cpp"], "llama_cpp": str(tmp_path)}

    before = speed_facts(recipe, asked)
    binary.write_text("two")
    assert speed_facts(recipe, asked) != before
    assert speed_facts(recipe, asked) == speed_facts(recipe, asked)


def speed_facts(recipe: MakeRecipe, asked: dict[str, Any]) -> dict[str, Any]:
    """What the key of a benchmark holds beside its options and models."""
    return next(step.facts for step in build(recipe(benchmark=asked)).steps if step.name == "benchmark")


@pytest.mark.parametrize(
    ("engine", "variable"),
    [
        ("torch", "OMP_NUM_THREADS"),
        ("torch", "TASK_QUEUE_ENABLE"),
        ("torch", "PYTORCH_NPU_ALLOC_CONF"),
        ("llama.cpp", "OMP_NUM_THREADS"),
        ("llama.cpp", "GGML_CANN_WEIGHT_NZ"),
    ],
)
def test_a_setting_that_changes_an_engines_speed_is_measured_again(
    recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, engine: str, variable: str
) -> None:
    asked = {"engines": [engine]}
    before = speed_facts(recipe, asked)
    monkeypatch.setenv(variable, "7")
    assert speed_facts(recipe, asked) != before


@pytest.mark.parametrize(
    ("engine", "variable"),
    [
        ("torch", "GGML_CANN_WEIGHT_NZ"),
        ("torch", "ASCEND_RT_VISIBLE_DEVICES"),
        ("torch", "OMP_TOOL_LIB_PATH"),
        ("llama.cpp", "PYTORCH_NPU_ALLOC_CONF"),
    ],
)
def test_a_setting_that_does_not_is_no_reason_to(
    recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, engine: str, variable: str
) -> None:
    asked = {"engines": [engine]}
    before = speed_facts(recipe, asked)
    monkeypatch.setenv(variable, "7")
    assert speed_facts(recipe, asked) == before


def test_other_versions_of_torch_its_npu_backend_and_cann_are_measured_again(
    recipe: MakeRecipe, npu: types.ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = {"engines": ["torch"], "device": "npu"}
    found = [speed_facts(recipe, asked)]
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    (tmp_path / "version.cfg").write_text("version=9.1.0\n")
    found.append(speed_facts(recipe, asked))
    (tmp_path / "torch_npu-2.13.0.dist-info").mkdir()
    (tmp_path / "torch_npu-2.13.0.dist-info" / "METADATA").write_text("Name: torch-npu\nVersion: 2.13.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    found.append(speed_facts(recipe, asked))
    monkeypatch.setattr(torch, "__version__", "2.99")
    found.append(speed_facts(recipe, asked))
    assert all(one != other for one, other in pairwise(found))
    assert found[-1]["drivers"] == {"cann": "9.1.0", "driver": None, "firmware": None}


def test_a_benchmark_whose_times_would_be_false_is_refused_before_anything_runs(
    recipe: MakeRecipe, npu: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASCEND_LAUNCH_BLOCKING", "1")
    build(recipe(benchmark={"device": "cpu"}))
    with pytest.raises(CameraError, match=r"ASCEND_LAUNCH_BLOCKING is set: .*unset it"):
        build(recipe(benchmark={"device": "npu"}))
