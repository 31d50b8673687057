"""Damage per layer: read from what pruning recorded, drawn where there is any."""

from pathlib import Path

import pytest
import torch

from camera.files import read_json, write_json
from camera.options import CaptureOptions, PruneOptions
from camera.pruning.prune_by_walk import prune_by_walk
from camera.report.damage import layer_damage
from camera.report.html import render_html
from tests.camera.report.conftest import Run
from tests.tiny import TOKENS


@pytest.fixture
def refitted(run: Run, tmp_path: Path) -> Path:
    """What a prune with a refit writes."""
    tokens = torch.randint(0, TOKENS, (16, 64), generator=torch.Generator().manual_seed(7))
    capture = CaptureOptions(device="cpu", dtype="float32")
    prune_by_walk(run.source, tokens, tmp_path, capture, PruneOptions(ratio=0.3, multiple_of=16, refit=True))
    return tmp_path


def test_every_layer_that_a_refit_looked_at_has_its_two_errors(run: Run, refitted: Path) -> None:
    cuts = read_json(refitted / "prune.json")["cuts"]
    damage = layer_damage(refitted)
    assert [layer.plain for layer in damage] == [cut["error_plain"] for cut in cuts]
    assert [layer.kept for layer in damage] == [
        cut["error"] if cut["refitted"] else cut["error_plain"] for cut in cuts
    ]


def test_a_refused_layer_has_the_error_of_the_plain_cut(run: Run, refitted: Path) -> None:
    summary = read_json(refitted / "prune.json")
    summary["cuts"][1] |= {"refused": "for a reason", "refitted": False, "error": 0.9}
    write_json(refitted / "prune.json", summary)
    layer = layer_damage(refitted)[1]
    assert layer.kept == layer.plain < 0.9


def test_of_several_steps_the_last_counts(run: Run, refitted: Path) -> None:
    summary = read_json(refitted / "prune.json")
    later = [{**cut, "step": 2, "error": cut["error"] / 2} for cut in summary["cuts"]]
    write_json(refitted / "prune.json", {**summary, "cuts": [*summary["cuts"], *later]})
    assert {layer.step for layer in layer_damage(refitted)} == {2}


def test_a_plain_prune_has_none_and_no_chart(run: Run) -> None:
    results = run.results()
    assert layer_damage(run.folders["pruned"]) == layer_damage(None) == results.damage == ()
    assert "damage" not in results.model_dump()
    assert "Damage by layer" not in render_html(results)


def test_the_report_draws_what_was_recorded(run: Run, refitted: Path) -> None:
    results = run.results().model_copy(update={"damage": layer_damage(refitted)})
    assert "Damage by layer" in render_html(results)
