"""Perplexity and divergence, against transformers' own layers and a softmax over all of the vocabulary."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.data import evaluation_tokens
from camera.options import DatasetOptions
from tests.real.checkpoint import WIDTH
from tests.real.plain import log_probabilities, mean_loss, reader
from tests.real.workshop import Done, Workshop

pytestmark = pytest.mark.real
Run = Callable[[str], Done]
WINDOW = 128


@pytest.fixture(scope="module")
def window_T(workshop: Workshop) -> torch.Tensor:
    """The first window of the text."""
    tokenizer = Checkpoint.open(workshop.model).load_tokenizer()
    return evaluation_tokens(DatasetOptions(name="stdlib", split="test"), tokenizer, WINDOW)[:WINDOW]


def test_perplexity_and_divergence_are_those_of_the_whole_distributions(
    run: Run, model: Path, window_T: torch.Tensor
):
    found = run("evaluate").json
    assert (found["tokens"], found["windows"], found["window"]) == (WINDOW - 1, 1, WINDOW)
    pruned = run("prune").out
    width = json.loads((pruned / "config.json").read_text())["intermediate_size"]
    ours_TV = log_probabilities(reader(pruned), width, window_T, torch.bfloat16)
    theirs_TV = log_probabilities(reader(model), WIDTH, window_T, torch.bfloat16)
    assert found["perplexity"] == pytest.approx(mean_loss(ours_TV, window_T).exp().item(), rel=0.01)
    divergence_T = (theirs_TV.exp() * (theirs_TV - ours_TV)).sum(1)[:-1]
    assert found["divergence"]["divergence"] == pytest.approx(divergence_T.double().mean().item(), rel=0.05)
    agreed_T = ours_TV.argmax(1) == theirs_TV.argmax(1)
    assert found["divergence"]["top_1_agreement"] == pytest.approx(
        agreed_T[:-1].float().mean().item(), abs=0.05
    )


def test_in_float32_perplexity_is_exact_and_a_model_is_not_far_from_itself(
    run: Run, model: Path, window_T: torch.Tensor
):
    found = run("evaluate-float32").json
    log_p_TV = log_probabilities(reader(model), WIDTH, window_T, torch.float32)
    assert found["perplexity"] == pytest.approx(mean_loss(log_p_TV, window_T).exp().item(), rel=1e-4)
    assert found["divergence"]["divergence"] == pytest.approx(0, abs=1e-9)
    assert found["divergence"]["top_1_agreement"] == 1


def test_the_twin_in_a_gguf_file_computes_what_the_folder_does(run: Run):
    found = run("evaluate-packed").json
    assert found["divergence"]["divergence"] == pytest.approx(0, abs=1e-6)
    assert found["divergence"]["top_1_agreement"] == 1


def test_tasks_are_answered(run: Run, workshop: Workshop):
    tasks = workshop.folder / "tasks"
    tasks.mkdir(exist_ok=True)
    questions = [
        {
            "question": f"is {a} + {b} {c}",
            "passage": f"Sums. {a} + {b} = {a + b}.",
            "idx": at,
            "label": int(a + b == c),
        }
        for at, (a, b, c) in enumerate(((1, 2, 3), (2, 2, 5), (3, 4, 7), (5, 4, 8)))
    ]
    for split in ("train", "validation"):
        (tasks / f"boolq.{split}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in questions))
    found = run("evaluate-tasks").json["tasks"]["boolq"]
    assert (found["documents"], found["few_shot"]) == (2, 1)
    assert found["metrics"]["acc"]["value"] in (0, 0.5, 1)
