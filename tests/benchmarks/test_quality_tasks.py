"""Choices are scored by log-likelihood over bytes, whatever they are batched with."""

import json
from pathlib import Path

import pytest
import torch
from quality_tasks import Item, Task, read_items

from camera.checkpoints.checkpoint import Checkpoint
from camera.errors import CameraError
from tests.tiny import tiny_checkpoint

ITEMS = [
    Item("Question: what is above the sea?\nAnswer:", ("the lamp", "a quiet harbour in the morning"), 0),
    Item("Question: how many ships?\nAnswer:", ("twelve ships, then more", "one", "two or three"), 2),
    Item("Question: who?\nAnswer:", ("the girl", "the keeper of the light", "gulls", "crabs"), 1),
]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_answers_are_those_of_scoring_every_choice_alone(family: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path / "model", family))
    model, tokenizer = checkpoint.load_model(), checkpoint.load_tokenizer()
    expected = []
    for item in ITEMS:
        scores = []
        for choice in item.choices:
            context = tokenizer(item.context)["input_ids"]
            whole = tokenizer(f"{item.context} {choice}")["input_ids"]
            log_p = model(torch.tensor([whole])).logits[0].detach().log_softmax(-1)
            total = sum(float(log_p[at - 1, whole[at]]) for at in range(len(context), len(whole)))
            scores.append(total / (len(choice) + 1))
        expected.append(scores.index(max(scores)) == item.gold)
    assert Task(ITEMS, tokenizer, 512).answers(model) == expected


def test_a_question_longer_than_the_model_loses_its_beginning(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path / "model"))
    long = Item("the old lighthouse keeper " * 300, ("yes", "no"), 0)
    assert len(Task([long], checkpoint.load_tokenizer(), 512).answers(checkpoint.load_model())) == 1


def test_the_same_items_are_drawn_every_time(tmp_path: Path) -> None:
    rows = [{"goal": f"goal {n}", "sol1": "a", "sol2": "b", "label": n % 2} for n in range(50)]
    (tmp_path / "piqa.validation.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first = read_items(tmp_path, "piqa", 10)
    assert first == read_items(tmp_path, "piqa", 10)
    assert len(set(first)) == 10
    assert len(read_items(tmp_path, "piqa", 1000)) == 50


def test_a_file_of_other_rows_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "piqa.validation.jsonl").write_text('{"question": "?"}\n')
    with pytest.raises(CameraError, match=r"piqa\.validation\.jsonl does not hold rows of piqa"):
        read_items(tmp_path, "piqa", 1)
