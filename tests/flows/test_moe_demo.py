"""The trained mixture of experts goes the whole way: `make demo-moe`, with less to measure."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from camera.checkpoints.checkpoint import Checkpoint
from tests.conftest import REPOSITORY
from tests.flows.conftest import Workplace

pytestmark = pytest.mark.slow


def test_a_trained_mixture_of_experts_is_published_audited_and_cached(
    tmp_path: Path, shared_data: Path, states: Callable[[str], dict[str, str]]
) -> None:
    workplace = Workplace(tmp_path)
    _write_recipe(workplace, shared_data)
    first = states(workplace.camera("run", "recipe.yaml", "--no-prefect").stdout)
    assert set(first.values()) == {"done"}
    published = tmp_path / "published" / "tiny-qwen3-moe-p40"

    results = json.loads((published / "results.json").read_text(encoding="utf-8"))
    prune, models = results["prune"], {row["id"]: row for row in results["models"]}
    saved = Checkpoint.open(published)
    assert (saved.expert_count, saved.ffn_width) == (prune["experts_kept"], prune["kept_width"])
    assert prune["removed_share"] >= 0.4
    assert models["pruned"]["perplexity"]["manuals"]["change"] < 0.15
    assert models["pruned+quantized"]["bytes"] < 0.2 * models["original"]["bytes"]
    card = (published / "README.md").read_text(encoding="utf-8")
    assert f"Of the 16 experts of each layer, the {16 - prune['experts_kept']} that put out the least" in card

    through_prefect = states(workplace.camera("run", "recipe.yaml").stdout)
    assert set(through_prefect.values()) == {"cached"}
    assert workplace.camera("audit", str(published)).stdout.startswith("✓ verified: ")


def _write_recipe(workplace: Workplace, shared_data: Path) -> None:
    """The recipe of the project, on two disjoint parts of its text, with few windows and short benchmarks."""
    recipe = yaml.safe_load((REPOSITORY / "recipes" / "moe-demo.yaml").read_text(encoding="utf-8"))
    text = (shared_data / "text" / "manuals_sample.txt").read_text(encoding="utf-8")
    half = len(text) // 2
    for name, part in (("calibration.txt", text[:half]), ("manuals.txt", text[half:])):
        (workplace.folder / name).write_text(part, encoding="utf-8")
    recipe["model"] = str(shared_data / "models" / "tiny-qwen3-moe")
    recipe["calibration"] |= {"path": "calibration.txt", "samples": 32, "length": 256}
    recipe["evaluate"] |= {"datasets": [{"name": "file", "path": "manuals.txt"}], "max_windows": 8}
    recipe["benchmark"] = {"engines": ["torch"], "decode": [4], "repeats": 1, "threads": 1}
    recipe["publish"] = {"dvc": False}
    workplace.recipe.write_text(yaml.safe_dump(recipe), encoding="utf-8")
