"""The script that makes the third model of the quality table, run for two steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.data.sets.file import read
from camera.data.sets.stdlib import part_of
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow


def run_script(out: Path, texts: Path) -> "subprocess.CompletedProcess[str]":
    command = [
        sys.executable,
        "scripts/train_third.py",
        "--steps",
        "2",
        "--out",
        str(out),
        "--texts",
        str(texts),
    ]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment, check=False, capture_output=True, text=True
    )


def test_it_makes_a_qwen2_that_never_saw_the_test_part(shared_data: Path, tmp_path: Path) -> None:
    finished = run_script(tmp_path / "third", shared_data / "text")
    assert finished.returncode == 0, finished.stderr
    checkpoint = Checkpoint.open(tmp_path / "third")
    checkpoint.check_shapes()
    assert (checkpoint.family.model_type, checkpoint.ffn_width, checkpoint.layer_count) == ("qwen2", 640, 4)
    tokenizer = checkpoint.load_tokenizer()
    text = "The harbour was quiet; 12 ships, naïve & new."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert torch.isfinite(checkpoint.load_model()(torch.arange(64)[None]).logits).all()
    record = json.loads((tmp_path / "third" / "training.json").read_text())
    documents = read(shared_data / "text" / "c4_en_sample.jsonl", "text").texts
    held_out = "\n\n".join(text for text in dict.fromkeys(documents) if part_of(text) == "test")
    assert len(tokenizer(held_out, verbose=False)["input_ids"]) == record["test_tokens"]


def test_a_folder_without_the_texts_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    finished = run_script(tmp_path / "third", tmp_path / "empty")
    assert finished.returncode == 2
    assert "c4_en_sample.jsonl does not exist" in finished.stderr
    assert not (tmp_path / "third").exists()
