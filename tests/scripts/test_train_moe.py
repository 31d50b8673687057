"""The script that makes the second mixture of experts of the quality table: its balance, and two steps of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from camera.checkpoints.checkpoint import Checkpoint
from tests.conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "scripts"))

from train_moe import BALANCE, SHAPE, balance, keep_balanced


def test_the_balance_is_one_where_experts_are_even_and_more_where_they_are_not() -> None:
    even_TE = torch.zeros(8, 4)
    chosen_TK = torch.arange(16).view(8, 2) % 4
    assert float(balance(even_TE, chosen_TK)) == pytest.approx(1)
    assert float(balance(even_TE + torch.tensor([9.0, 9, 0, 0]), chosen_TK % 2)) == pytest.approx(2, rel=1e-3)


def test_a_router_gets_the_gradient_of_the_balance_in_training_alone() -> None:
    from transformers import DeepseekV2Config
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter

    router = DeepseekV2TopkRouter(DeepseekV2Config(**SHAPE))
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    keep_balanced(router)
    x_TH = torch.randn(32, SHAPE["hidden_size"], generator=torch.Generator().manual_seed(1))

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, router.weight)[0]

    logits_TE, weight_TK, chosen_TK = router(x_TH)
    alone = BALANCE * balance(logits_TE, chosen_TK)
    added = gradient(weight_TK.sum())
    logits_TE, weight_TK, _ = router.eval()(x_TH)
    plain = gradient(weight_TK.sum())
    assert torch.allclose(added - plain, gradient(BALANCE * balance(router(x_TH)[0], chosen_TK)), atol=1e-7)
    assert alone.item() > BALANCE


@pytest.mark.slow
def test_it_makes_a_deepseek_v2_that_never_saw_the_last_stories(shared_data: Path, tmp_path: Path) -> None:
    out, texts = tmp_path / "moe", shared_data / "text"
    command = [
        sys.executable,
        "scripts/train_moe.py",
        "--steps",
        "2",
        "--out",
        str(out),
        "--texts",
        str(texts),
    ]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    finished = subprocess.run(
        command, cwd=REPOSITORY, env=environment, check=False, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    checkpoint = Checkpoint.open(out)
    checkpoint.check_shapes()
    assert (checkpoint.family.model_type, checkpoint.ffn_width) == ("deepseek_v2", 64)
    assert (checkpoint.expert_count, [checkpoint.is_sparse(layer) for layer in range(4)]) == (
        16,
        [False, True, True, True],
    )
    held_out = json.loads((out / "training.json").read_text())["test_tokens"]
    stories = (texts / "tinystories_sample.txt").read_text().split("<|endoftext|>")
    last = "\n\n".join(story.strip() for story in stories[-len(stories) // 5 :] if story.strip())
    assert len(checkpoint.load_tokenizer()(last, verbose=False)["input_ids"]) == pytest.approx(
        held_out, rel=0.01
    )
