"""Damage per layer: read from what pruning recorded, drawn where there is any."""

import shutil
from pathlib import Path

import pytest
import torch

from camera.files import read_json, write_json
from camera.options import CaptureOptions, PruneOptions
from camera.pruning.prune_checkpoint import prune_checkpoint
from camera.report.html import render_html
from camera.report.layers import layer_damage
from tests.camera.report.conftest import Run
from tests.tiny import TOKENS


@pytest.fixture
def refitted(run: Run, tmp_path: Path) -> Path:
    """What a prune with a refit writes."""
    tokens = torch.randint(0, TOKENS, (16, 64), generator=torch.Generator().manual_seed(7))
    capture = CaptureOptions(device="cpu", dtype="float32")
    asked = PruneOptions(ratio=0.3, multiple_of=16, method="refit")

    def keep(model: Path, pruned: Path) -> None:
        shutil.copytree(pruned, tmp_path / "pruned")

    prune_checkpoint(run.source, tokens, tmp_path / "model", capture, asked, finish=keep)
    return tmp_path / "pruned"


def test_every_layer_that_a_refit_looked_at_has_its_two_errors(run: Run, refitted: Path) -> None:
    decisions = read_json(refitted / "prune.json")["decisions"]
    damage = layer_damage(refitted)
    assert [layer.plain for layer in damage] == [decision["error_camera"] for decision in decisions]
    assert [layer.kept for layer in damage] == [
        decision["error"] if decision["refitted"] else decision["error_camera"] for decision in decisions
    ]


def test_a_refused_layer_has_the_error_of_the_plain_cut(run: Run, refitted: Path) -> None:
    summary = read_json(refitted / "prune.json")
    summary["decisions"][1] |= {"fallback": "for a reason", "refitted": False, "error": 0.9}
    write_json(refitted / "prune.json", summary)
    layer = layer_damage(refitted)[1]
    assert layer.kept == layer.plain < 0.9


def test_a_plain_prune_has_none_and_no_chart(run: Run) -> None:
    results = run.results()
    assert layer_damage(run.folders["pruned"]) == results.damage == ()
    assert "damage" not in results.model_dump()
    assert "Damage by layer" not in render_html(results)


def test_the_report_draws_what_was_recorded(run: Run, refitted: Path) -> None:
    results = run.results().model_copy(update={"damage": layer_damage(refitted)})
    assert "Damage by layer" in render_html(results)
