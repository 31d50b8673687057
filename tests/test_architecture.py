"""docs/architecture.md keeps its word: one file adds a family, a format, a method, an engine, a data set, a stage.

A temporary distribution, found by its entry points, adds one of each; then a checkpoint of the new family is pruned by the
new method on the new data set, stored in the new format, timed by the new engine, and passed by the new stage.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from camera.checkpoints.safetensors_file import read_tensors
from camera.files import read_json, write_json
from tests.conftest import REPOSITORY
from tests.tiny import tiny_checkpoint

TOYS = {
    "toy_family": """
from camera.models.family import FAMILIES, Family
from camera.models.weights import decoder_weights

def register():
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    class ToyConfig(LlamaConfig):
        model_type = "toy"

    class ToyForCausalLM(LlamaForCausalLM):
        config_class = ToyConfig

    AutoConfig.register("toy", ToyConfig, exist_ok=True)
    AutoModelForCausalLM.register(ToyConfig, ToyForCausalLM, exist_ok=True)

FAMILIES.register("toy", Family("toy", "ToyForCausalLM", "llama", decoder_weights({}), permutes_rotary=True, register=register))
""",
    "toy_format": """
import torch
from camera.formats.format import BlockFormat
from camera.registry import BLOCK_FORMATS

class Sign(BlockFormat):
    name = "sign"
    block_length, block_bytes = 8, 8
    tensor_number, file_number = 900, 900
    fallback = "f16"

    def encode(self, chunk, out, scratch):
        out.copy_((chunk.reshape(out.shape) > 0).to(torch.uint8))
        return True

    def decode(self, stored, out, scratch):
        out.copy_(stored.float().mul(2).sub(1))

BLOCK_FORMATS.register("sign", Sign())
""",
    "toy_method": """
import torch
from camera.pruning.methods import Choice
from camera.registry import PRUNING_METHODS

class First:
    needs_gram = False
    title = "their place"

    def decide(self, block, plan):
        return Choice(torch.arange(block.kept))

    def multiplications(self, width, hidden, kept, dampings):
        return 0

PRUNING_METHODS.register("first", First())
""",
    "toy_engine": """
from camera.engines import ENGINES, Engine, Footprint, Timing

class Toy(Engine):
    positions = 512

    @classmethod
    def load(cls, path, options, device):
        return cls()

    @classmethod
    def build(cls, options):
        return "toy 1"

    def time_once(self, prompt, decode):
        return Timing(0.001 * prompt, {count: 0.001 * count for count in decode})

    def footprint(self):
        return Footprint(1, None, None, 1, 1)

    def describe(self):
        return {"build": "toy 1"}

    def close(self):
        pass

ENGINES.register("toy", Toy)
""",
    "toy_data": """
from camera.data.sets import DATA_SETS, DataSet, Documents

class Counting(DataSet):
    def read(self, options):
        return Documents([" ".join(str(number) for number in range(2000))], " ", "numbers")

DATA_SETS.register("counting", Counting())
""",
    "toy_stage": """
from tasks.options import Sections
from tasks.stage import STAGES, Stage, Step, register
from tasks.estimate import Needs

def run(context):
    (context.out / "kept.txt").write_text("seen")
    return {"seen": 1.0}

register(Stage("toy", 1, run, {}, lambda known: Needs(), True,
               joins=lambda steps: [Step("toy", STAGES["toy"], Sections(), {"pruned": "prune"})]))
""",
}


@pytest.fixture(scope="module")
def distribution(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the toys as one installed distribution."""
    folder = tmp_path_factory.mktemp("toys")
    for name, text in TOYS.items():
        (folder / f"{name}.py").write_text(text)
    info = folder / "toys-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toys\nVersion: 1\n")
    rooms = {"toy_stage": "camera.pipeline"}
    lines = [f"[{rooms.get(name, 'camera')}]\n{name} = {name}\n" for name in TOYS]
    (info / "entry_points.txt").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the new family."""
    folder = tiny_checkpoint(tmp_path_factory.mktemp("model") / "toy")
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {**config, "model_type": "toy", "architectures": ["ToyForCausalLM"]})
    return folder


def camera(distribution: Path, *arguments: str | Path) -> str:
    """The command line as a person runs it who has installed the toys."""
    path = os.pathsep.join([str(REPOSITORY), str(distribution)])
    command = [sys.executable, "-m", "camera", *map(str, arguments)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, cwd=distribution
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_file_each_adds_a_family_a_format_a_method_an_engine_and_a_data_set(
    distribution: Path, toy: Path, tmp_path: Path
) -> None:
    pruned, packed = tmp_path / "pruned", tmp_path / "packed"
    shape = ("--samples", "2", "--length", "16", "--ratio", "0.25", "--multiple-of", "4")
    camera(distribution, "prune", toy, pruned, "--calibration", "counting", "--method", "first", *shape)
    assert read_json(pruned / "config.json")["intermediate_size"] == 144
    name = "model.layers.1.mlp.gate_proj.weight"  # the method's choice, and not CAMERA's
    before, after = (read_tensors(folder / "model.safetensors")[name] for folder in (toy, pruned))
    assert torch.equal(after, before[:144])
    camera(distribution, "quantize", pruned, packed, "--type", "sign")
    assert read_json(packed / "quantized.json")["type"] == "sign"
    timed = camera(
        distribution, "bench", pruned, "--engine", "toy", "--decode", "4", "--repeats", "3", "--json"
    )
    assert {row["engine"] for row in json.loads(timed)["rows"]} == {"toy"}


@pytest.mark.slow
def test_a_file_adds_a_stage(distribution: Path, tmp_path: Path) -> None:
    model, text, recipe = (
        tiny_checkpoint(tmp_path / "model"),
        tmp_path / "story.txt",
        tmp_path / "recipe.yaml",
    )
    text.write_text("The keeper climbed the narrow stairs each evening. " * 60)
    dataset = {"name": "file", "path": str(text)}
    content = {
        "name": "tiny",
        "model": str(model),
        "calibration": {**dataset, "samples": 2, "length": 16},
        "prune": {"ratio": 0.25, "multiple_of": 4},
        "evaluate": {"datasets": [dataset], "window": 32},
    }
    write_json(recipe, content)  # JSON is YAML
    planned = json.loads(camera(distribution, "plan", recipe, "--json"))
    assert "toy" in {step["step"] for step in planned["steps"]}


@pytest.mark.parametrize("page", ["architecture.md"])
def test_every_place_that_the_page_names_is_there(page: str) -> None:
    named = re.findall(r"`((?:camera|tasks|flows)/[\w/.]+)`", (REPOSITORY / "docs" / page).read_text("utf-8"))
    assert len(named) > 5
    assert [name for name in named if not (REPOSITORY / name).exists()] == []
