"""What a model writes after the fixed prompts."""

from pathlib import Path

import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.evaluation.samples import PROMPTS, QUESTION, write_samples
from tests.tiny import tiny_checkpoint


def test_each_prompt_is_followed_by_the_likeliest_tokens(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(tmp_path / "model", "qwen2"))
    samples = write_samples(checkpoint.folder, 5, "float32", "cpu")
    assert [sample.prompt for sample in samples] == [*PROMPTS, QUESTION]
    model, tokenizer = checkpoint.load_model(), checkpoint.load_tokenizer()
    tokens = tokenizer(PROMPTS[0]).input_ids
    with torch.no_grad():
        for _ in range(5):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
            if tokens[-1] == model.generation_config.eos_token_id:
                break
    start = len(tokenizer(PROMPTS[0]).input_ids)
    assert samples[0].text == tokenizer.decode(tokens[start:], skip_special_tokens=True)
