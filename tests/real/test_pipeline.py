"""The whole pipeline by a recipe: what it plans, publishes, and finds again."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from camera.formats.gguf_reader import open_gguf
from tests.real.test_prune import assert_sliced, kept_channels
from tests.real.workshop import Done, Workshop

pytestmark = pytest.mark.real
Run = Callable[[str], Done]
RECIPE = {
    "name": "real",
    "model": "model",
    "calibration": {"name": "stdlib", "samples": 2, "length": 128},
    "prune": {"ratio": 0.2},
    "quantize": {"type": "q4_0_64", "twin": "q4_0"},
    "evaluate": {"datasets": [{"name": "stdlib", "split": "test"}], "window": 128, "max_windows": 1},
    # the torch engine would hold the four models that a run compares: 9 GB
    "benchmark": {"engines": ["llama.cpp"], "decode": [4], "repeats": 1},
}


@pytest.fixture(scope="module", autouse=True)
def recipe(workshop: Workshop) -> None:
    """`recipe.yaml`, for all commands of the pipeline."""
    (workshop.folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))


def test_the_plan_says_what_will_run_and_about_how_much_memory(run: Run):
    found = run("plan").json
    assert {step["state"] for step in found["steps"]} == {"run", "after"}
    (capture,) = (step for step in found["steps"] if step["stage"] == "capture")
    assert 0.5 < capture["memory_bytes"] / run("run").peak_bytes < 1.5


def test_a_recipe_publishes_a_pruned_model_whose_lineage_holds(run: Run, model: Path):
    done = run("run")
    published = Path(done.json["published"])
    config = json.loads((published / "config.json").read_text())
    assert config["intermediate_size"] == 10240
    kept_K = kept_channels(model, published, 0)
    assert len(kept_K) == 10240
    assert_sliced(model, published, 0, kept_K)
    gguf = open_gguf(Path(done.json["gguf"]))
    assert gguf.tensors["blk.1.ffn_down.weight"].shape == (4096, 10240)
    assert (
        gguf.tensors["output.weight"].type == "q8_0"
    )  # of more rows than an Ascend card computes in q4_0_64
    assert run("audit").json["verdict"] == "verified"
