"""What a report says of a mixture of experts."""

from pathlib import Path

import pytest
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.files import read_json
from camera.options import CaptureOptions, PruneOptions
from camera.pruning.plan import plan_prune
from camera.pruning.split import NEARLY
from camera.pruning.stages import capture, prune, save, score
from camera.report.collect import collect_results
from camera.report.html import render_html
from camera.report.schema import Results
from camera.report.table import quality_grid
from camera.report.words import method_words, widths_words
from tests.camera.report.test_html import Page
from tests.tiny import TOKENS, tiny_moe_checkpoint

CAPTURE = CaptureOptions(propagate="one-shot", device="cpu", dtype="float32")


def reported(root: Path, asked: PruneOptions) -> tuple[Results, Path]:
    """The results of a run without quantisation, and the folder that prune wrote."""
    source = Checkpoint.open(tiny_moe_checkpoint(root / "source", "qwen2_moe"))
    folders = {name: root / name for name in ("capture", "scores", "pruned", "saved")}
    for folder in folders.values():
        folder.mkdir()
    tokens = torch.randint(3, TOKENS, (6, 32), generator=torch.Generator().manual_seed(0))
    plan = plan_prune(source, CAPTURE, asked)
    capture(source, tokens, folders["capture"], CAPTURE, plan)
    score(source, folders["capture"], folders["scores"], asked.reduce_ratio)
    prune(source, folders["scores"], folders["pruned"], plan, asked, folders["capture"])
    save(source, folders["pruned"], folders["saved"])
    recipe = {"model": "tiny", "prune": asked.model_dump(mode="json")}
    return collect_results(name="tiny", recipe=recipe, folders=folders, source=source), folders["pruned"]


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Path]:
    asked = PruneOptions(ratio=0.4, experts="auto", multiple_of=16)
    return reported(tmp_path_factory.mktemp("split"), asked)


def drawn(results: Results) -> set[str | None]:
    elements = Page(render_html(results)).elements
    return {attributes["aria-label"] for tag, attributes in elements if tag == "svg"}


def test_every_expert_is_there_with_its_tokens_and_what_stays(split: tuple[Results, Path]) -> None:
    results, pruned = split
    summary = read_json(pruned / "prune.json")
    assert [layer.layer for layer in results.experts] == [0, 1, 2]
    for layer in results.experts:
        assert sum(layer.tokens) == 6 * 32 * 3  # each token goes to three
        assert sum(layer.energy) == pytest.approx(1, abs=1e-3)
        assert len(layer.kept) == 8
        assert (
            sorted(layer.kept)[-summary["experts_kept"] :]
            == [summary["kept_width"]] * summary["experts_kept"]
        )
        assert layer.kept.count(0) == 8 - summary["experts_kept"]


def test_dropped_experts_are_crossed_out(split: tuple[Results, Path]) -> None:
    results, _ = split
    dropped = sum(layer.kept.count(0) for layer in results.experts)
    (crosses,) = [
        one["d"]
        for tag, one in Page(render_html(results)).elements
        if tag == "path" and one["class"] == "gone"
    ]
    assert dropped > 0
    assert crosses is not None
    assert crosses.count("M") == 2 * dropped


def test_the_split_is_shown_with_what_it_was_chosen_from(split: tuple[Results, Path]) -> None:
    results, _ = split
    assert results.prune is not None
    considered = results.prune.considered
    assert len(considered) > 1
    assert considered[0].loss <= NEARLY * min(each.loss for each in considered)
    assert (considered[0].experts_kept, considered[0].kept) == (
        results.prune.experts_kept,
        results.prune.kept_width,
    )
    html = render_html(results)
    assert "Fewer experts or narrower ones" in html
    for each in considered:
        assert f"<span>{each.experts_kept} × {each.kept}</span>" in html.replace(' class="strong"', "")


def test_widths_are_told_as_experts_times_channels(split: tuple[Results, Path]) -> None:
    results, pruned = split
    summary = read_json(pruned / "prune.json")
    kept = f"{summary['experts_kept']} × {summary['kept_width']}"
    assert [row[2] for row in quality_grid(results).rows] == ["8 × 96", kept]
    original, product = results.models
    source = Checkpoint.open(pruned.parent / "source")
    assert original.bytes == sum(info.size_bytes for info in source.needed.values())
    assert product.bytes is not None
    assert product.bytes < original.bytes


def test_a_page_of_experts_draws_them_and_not_channels_of_one_network(split: tuple[Results, Path]) -> None:
    found = drawn(split[0])
    assert "Tokens by layer and expert" in found
    assert "Channels kept, by layer" not in found
    assert "Channels kept by layer and expert" not in found  # all that stay have one width


def test_a_joint_ranking_shows_what_stays_of_each_expert(tmp_path: Path) -> None:
    asked = PruneOptions(ratio=0.3, mode="mask", scope="layer", multiple_of=8)
    results, _ = reported(tmp_path, asked)
    assert "Channels kept by layer and expert" in drawn(results)
    assert results.prune is not None
    assert "channels on average per layer" in widths_words(results.prune)


def test_experts_that_few_tokens_reached_are_named(split: tuple[Results, Path]) -> None:
    results = split[0]
    layer = results.experts[0].model_copy(update={"ranked_by_weights": {"experts.5": 2, "shared": 0}})
    html = render_html(results.model_copy(update={"experts": (layer, *results.experts[1:])}))
    assert "experts.5 (2), shared (0)" in html
    assert "Too few calibration tokens" in html


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("camera", "CAMERA's micro-expert importance, reduce-ratio α = 0.95 (method camera)"),
        (
            "refit",
            "CAMERA's micro-expert importance, reduce-ratio α = 0.95, down projections refitted (method refit)",
        ),
        (
            "obs",
            "the cost of a removal by Optimal Brain Surgeon, down projections refitted (method obs)",
        ),
    ],
)
def test_the_criterion_is_that_of_the_method(split: tuple[Results, Path], method: str, words: str) -> None:
    assert split[0].prune is not None
    told = split[0].prune.model_copy(update={"method": method})
    assert method_words(told) == words
