"""Every family as a tiny model, converted by us and by llama.cpp's own converter."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.files import read_json, write_json
from camera.formats.convert import convert_to_gguf
from camera.formats.gguf_reader import open_gguf
from camera.options import BlockType, QuantizeOptions
from camera.quantization.execute import quantize_checkpoint
from tests.parity.llama_cpp import source
from tests.tiny import (
    ALWAYS_TIED,
    DENSE_TYPES,
    MOE_TYPES_IN_GGUF,
    TOKENS,
    tiny_checkpoint,
    tiny_moe_checkpoint,
)

FAMILIES = (*DENSE_TYPES, *MOE_TYPES_IN_GGUF)
TYPES: tuple[BlockType, ...] = ("f16", "q8_0")
ROWS = TOKENS + 8
_GLM = ("[gMASK]", "<sop>", "<|user|>", "<|observation|>", "<|endoftext|>")


class Pair(NamedTuple):
    """Our file and theirs; what their converter said where it gave up."""

    ours: Path
    theirs: Path
    error: str | None


@pytest.fixture(scope="session")
def llama_cpp() -> Path:
    """llama.cpp's source."""
    found = source()
    if found is None:
        pytest.skip("no source of llama.cpp is here: `make test-parity` fetches it")
    return found


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory, llama_cpp: Path) -> dict[tuple[str, str], Pair]:
    """The files by family and type; all are made in two processes, ours in this."""
    folder = tmp_path_factory.mktemp("parity")
    jobs, made = [], []
    for family in FAMILIES:
        model = published(folder / family, family)
        for type in TYPES:
            packed, ours = folder / f"{family}-{type}", folder / f"{family}-{type}.gguf"
            quantize_checkpoint(
                Checkpoint.open(model),
                packed,
                QuantizeOptions(type=type, embedding_type=type, output_type=type),
            )
            convert_to_gguf(packed, ours, name=family)
            theirs = folder / f"{family}-{type}-theirs.gguf"
            pre = open_gguf(ours).metadata["tokenizer.ggml.pre"]
            jobs.append({"model": str(model), "type": type, "out": str(theirs), "pre": pre})
            made.append(((family, type), ours, theirs))
    outcomes = convert_theirs(llama_cpp, jobs)
    return {key: Pair(ours, theirs, error) for (key, ours, theirs), error in zip(made, outcomes, strict=True)}


def convert_theirs(llama_cpp: Path, jobs: list[dict[str, str | None]]) -> list[str | None]:
    """Run llama.cpp's converter in a process of its own; for each job None, or why it gave up."""
    program = Path(__file__).with_name("convert_theirs.py")
    done = subprocess.run(
        [sys.executable, "-P", str(program)],
        input=json.dumps({"source": str(llama_cpp), "jobs": jobs}),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    outcomes: list[str | None] = json.loads(done.stdout)
    return outcomes


def published(folder: Path, family: str) -> Path:
    """A tiny model with what llama.cpp's converter takes for granted in a published one."""
    if family in DENSE_TYPES:
        tiny_checkpoint(folder, family, vocab=ROWS, tied=family in ALWAYS_TIED, dtype=torch.bfloat16)
    else:
        tiny_moe_checkpoint(folder, family, vocab=ROWS, dtype=torch.bfloat16)
    config = read_json(folder / "config.json")
    if family == "hunyuan_v1_moe":  # lists of one number for each layer
        config["moe_intermediate_size"] = [config["intermediate_size"]] * config["num_hidden_layers"]
        config["num_shared_expert"] = [1] * config["num_hidden_layers"]
        config["moe_topk"] = [config["moe_topk"]] * config["num_hidden_layers"]
    if family == "phimoe":
        config["architectures"] = ["PhiMoEForCausalLM"]
        config["original_max_position_embeddings"] = 256
        config["rope_parameters"] = None
        config["rope_scaling"] = {
            "type": "longrope",
            "long_factor": [1.5 + number / 8 for number in range(8)],
            "short_factor": [1.0 + number / 16 for number in range(8)],
            "long_mscale": 1.25,
            "short_mscale": 1.25,
            "original_max_position_embeddings": 256,
        }
    if family == "glm4_moe":
        config["num_nextn_predict_layers"] = 0
    write_json(folder / "config.json", config)
    if family.startswith("glm4"):
        form = read_json(folder / "tokenizer.json")
        numbered = enumerate((text for text in _GLM if text not in form["model"]["vocab"]), start=TOKENS)
        added = [{**form["added_tokens"][0], "id": number, "content": text} for number, text in numbered]
        write_json(folder / "tokenizer.json", {**form, "added_tokens": form["added_tokens"] + added})
    if family == "ernie4_5":
        pieces = tiny_checkpoint(folder / "pieces", "llama")
        for name in ("tokenizer.model", "tokenizer_config.json"):
            shutil.copyfile(pieces / name, folder / name)
        (folder / "tokenizer.json").unlink(missing_ok=True)
        shutil.rmtree(pieces)
    return folder
