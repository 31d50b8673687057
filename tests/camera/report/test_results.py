"""What is gathered from the folders of a run."""

import json
import math
from pathlib import Path

import pytest

from camera.checkpoints.checkpoint import Checkpoint
from camera.errors import CameraError
from camera.files import read_json, write_json
from camera.pruning.summary import Pruned
from camera.report.collect import collect_results
from camera.report.layers import BINS, CURVE_POINTS
from camera.report.schema import MODEL_IDS, read_results
from tests.camera.pruning.conftest import only_kept, only_scores
from tests.camera.report.conftest import TEXT, Run


def test_every_model_of_the_run_has_a_row_in_order(run: Run) -> None:
    assert tuple(row.id for row in run.results().models) == MODEL_IDS


def test_sizes_of_the_original_follow_from_the_pruned_checkpoint(run: Run) -> None:
    row = run.results().row("original")
    needed = run.source.needed.values()
    assert row is not None
    assert row.parameters == sum(math.prod(info.shape) for info in needed)
    assert row.bytes == sum(info.size_bytes for info in needed)
    assert row.ffn_width == 192


def test_sizes_of_the_pruned_model_are_those_of_its_files(run: Run) -> None:
    row = run.results().row("pruned")
    needed = Checkpoint.open(run.folders["saved"]).needed.values()
    assert row is not None
    assert (row.type, row.ffn_width) == ("f32", 144)
    assert row.bytes == sum(info.size_bytes for info in needed)


def test_a_change_of_perplexity_is_relative_to_the_original_on_the_same_text(run: Run) -> None:
    results = run.results()
    original, pruned = (
        read_json(run.folders[f"evaluate/{model}/{TEXT}"] / "perplexity.json")["perplexity"]
        for model in ("original", "pruned")
    )
    row = results.row("pruned")
    assert row is not None
    assert row.perplexity[TEXT].change == pytest.approx(pruned / original - 1)


def test_perplexities_of_other_windows_are_not_compared(run: Run, tmp_path: Path) -> None:
    found = read_json(run.folders[f"evaluate/pruned/{TEXT}"] / "perplexity.json")
    write_json(tmp_path / "perplexity.json", {**found, "window": 25})
    other = Run(run.source, {**run.folders, f"evaluate/pruned/{TEXT}": tmp_path}, run.gguf, run.recipe)
    row = other.results().row("pruned")
    assert row is not None
    assert row.perplexity[TEXT].change is None


def test_the_prune_summary_joins_what_capture_score_and_prune_know(run: Run) -> None:
    prune = run.results().prune
    assert prune is not None
    assert (prune.width, prune.kept_width, prune.mode) == (192, 144, "physical")
    assert (prune.reduce_ratio, prune.propagate, prune.calibration_tokens) == (0.95, "one-shot", 6 * 32)


def test_each_layer_is_summed_up_small_and_true(run: Run) -> None:
    scores = only_scores(run.folders["scores"], 3)
    kept = only_kept(Pruned.open(run.folders["pruned"]))
    for layer, scores_F, kept_K in zip(run.results().importance, scores, kept, strict=True):
        assert len(layer.curve) == CURVE_POINTS
        assert list(layer.curve) == sorted(layer.curve, reverse=True)
        assert layer.curve[0] == pytest.approx(float(scores_F.max()), rel=1e-4)
        assert layer.quartiles[2] == pytest.approx(float(scores_F.median()), rel=0.1)
        assert len(layer.kept_bins) <= BINS
        assert sum(layer.kept_bins) == len(kept_K)  # 192 channels: a bin for each
        assert layer.kept_importance == pytest.approx(float(scores_F[kept_K].sum() / scores_F.sum()))


def test_tensors_that_fell_back_are_named_with_the_reason(run: Run) -> None:
    quantized = {entry.model: entry for entry in run.results().quantization}
    down = [entry for entry in quantized["pruned+quantized"].fall_backs if "down_proj" in entry.tensor]
    assert len(down) == 3
    assert all("144" in entry.reason for entry in down)
    assert quantized["baseline"].fall_backs == ()


def test_totals_of_the_types_add_up_to_the_model(run: Run) -> None:
    results = run.results()
    for entry in results.quantization:
        row = results.row(entry.model)
        assert row is not None
        assert sum(total.parameters for total in entry.types) == row.parameters
        assert sum(total.bytes for total in entry.types) == row.bytes


def test_speed_is_compared_with_the_baseline(run: Run) -> None:
    results = run.results()
    assert results.benchmark_baseline == "unpruned, q4_0"
    for row in results.benchmark:
        baseline = next(
            other
            for other in results.benchmark
            if (other.model, other.decode) == ("unpruned, q4_0", row.decode)
        )
        assert row.decode_ms is not None
        assert baseline.decode_ms is not None
        assert row.decode_speedup == pytest.approx(baseline.decode_ms.median / row.decode_ms.median)


@pytest.mark.parametrize(
    ("label", "title"),
    [
        ("pruned+quantized", "pruned, q4_0_64"),
        ("someone else's", "someone else's"),
    ],
)
def test_a_benchmark_calls_models_by_id_or_by_a_label_of_its_own(
    run: Run, tmp_path: Path, label: str, title: str
) -> None:
    report = read_json(run.folders["benchmark"] / "benchmark.json")
    report["rows"][0]["model"] = label
    write_json(tmp_path / "benchmark.json", report)
    other = Run(run.source, {**run.folders, "benchmark": tmp_path}, run.gguf, run.recipe)
    assert other.results().benchmark[0].model == title


def test_results_hold_no_path_of_the_machine(run: Run) -> None:
    text = run.results().model_dump_json()
    assert str(run.source.folder.parent) not in text
    assert '"model":"source"' in text  # the recipe's model, by its last part


def test_results_survive_their_file(run: Run, tmp_path: Path) -> None:
    results = run.results()
    write_json(tmp_path / "results.json", results.model_dump(mode="json"))
    assert read_results(tmp_path / "results.json") == results


@pytest.mark.parametrize(
    "part",
    ["capture", "scores", "pruned", "saved", "quantized", "quantized/baseline", "benchmark", "evaluate"],
)
def test_a_part_that_did_not_run_is_named(run: Run, part: str) -> None:
    missing = run.results(without=(part,)).missing
    assert any(f"({part})" in words for words in missing)


def test_a_run_of_nothing_has_results_too(run: Run) -> None:
    results = run.results(without=tuple(run.folders))
    assert results.models == ()
    assert results.product is None
    assert len(results.missing) == 8


def test_a_folder_without_its_file_is_an_error_that_names_it(run: Run, tmp_path: Path) -> None:
    other = Run(run.source, {**run.folders, "benchmark": tmp_path}, run.gguf, run.recipe)
    with pytest.raises(CameraError, match=r"benchmark\.json is missing"):
        other.results()


def test_a_file_that_is_no_results_is_refused_by_field(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"name": "x"}))
    with pytest.raises(CameraError, match=r"results\.json does not fit this version \(base_model"):
        read_results(tmp_path / "results.json")


def test_an_evaluation_of_an_unknown_model_is_refused(run: Run, tmp_path: Path) -> None:
    other = Run(run.source, {"evaluate/better/text": tmp_path}, run.gguf, run.recipe)
    with pytest.raises(CameraError, match="evaluate/better/text"):
        other.results()


def test_a_failure_names_no_place_of_this_machine_and_no_key_of_its_store(run: Run, tmp_path: Path) -> None:
    report = read_json(run.folders["benchmark"] / "benchmark.json")
    folder = f"/home/someone/.camera/store/save/{'a1' * 32}"
    report["rows"][0]["failure"] = f"{folder} is a folder: give the GGUF of this model"
    write_json(tmp_path / "benchmark.json", report)
    folders = {**run.folders, "benchmark": tmp_path}
    results = collect_results(name="tiny", recipe=run.recipe, folders=folders, source=run.source)
    assert results.benchmark[0].failure == "its artifact is a folder: give the GGUF of this model"
