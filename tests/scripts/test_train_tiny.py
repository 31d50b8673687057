"""The script that makes the bundled model, run for two steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.digests import digest_file
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow


def run_script(out: Path, *options: str) -> Path:
    command = [
        sys.executable,
        "scripts/train_tiny.py",
        "--out",
        str(out),
        "--steps",
        "2",
        "--threads",
        "1",
        *options,
    ]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, capture_output=True)
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_script(tmp_path_factory.mktemp("train") / "model")


def test_what_it_writes_is_laid_out_as_the_published_checkpoint(folder: Path, shared_data: Path) -> None:
    published = shared_data / "openpangu"
    for name in ("config.json", "generation_config.json", "special_tokens_map.json", "tokenizer_config.json"):
        ours, theirs = json.loads((folder / name).read_text()), json.loads((published / name).read_text())
        assert list(ours) == [key for key in theirs if key != "auto_map"], name
    patterns = [
        {
            name.replace(".0.", ".N.")
            for name in json.loads((at / "model.safetensors.index.json").read_text())["weight_map"]
        }
        for at in (folder, published)
    ]
    ours, theirs = ({name for name in names if not any(c.isdigit() for c in name)} for names in patterns)
    assert ours == theirs


def test_it_is_a_sharded_bf16_checkpoint_with_fp32_rotary_buffers(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    checkpoint.check_shapes()
    assert len(checkpoint.weight_files) >= 2
    assert {info.dtype for info in checkpoint.needed.values()} == {torch.bfloat16}
    extra = checkpoint.tensors["model.layers.5.self_attn.rotary_emb.inv_freq"]
    assert (extra.dtype, extra.shape) == (torch.float32, (16,))
    model = checkpoint.load_model(torch.float32)
    stored = checkpoint.read("model.layers.5.self_attn.rotary_emb.inv_freq")
    torch.testing.assert_close(stored, model.model.rotary_emb.inv_freq)


def test_its_chat_template_writes_turns_as_openpangu_does(folder: Path) -> None:
    tokenizer = Checkpoint.open(folder).load_tokenizer()
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "[unused9]System: [unused10][unused9]User: hi[unused10][unused9]Assistant: "
    assert tokenizer.eos_token == "[unused10]"
    assert tokenizer.eos_token_id == Checkpoint.open(folder).config["eos_token_id"]


def test_the_same_seed_gives_the_same_files_and_another_seed_others(folder: Path, tmp_path: Path) -> None:
    same, other = run_script(tmp_path / "same"), run_script(tmp_path / "other", "--seed", "1")
    for file in Checkpoint.open(folder).weight_files:
        assert digest_file(same / file) == digest_file(folder / file)
        assert digest_file(other / file) != digest_file(folder / file)
    assert digest_file(other / "tokenizer.model") == digest_file(folder / "tokenizer.model")
