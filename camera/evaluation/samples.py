"""What a model writes: the likeliest tokens after a few fixed prompts, for people to read."""

from pathlib import Path

import torch

from camera.checkpoints.guarded_tokenizer import GuardedTokenizer
from camera.checkpoints.tokenizer import load_tokenizer
from camera.loading import load_model
from camera.results import Result

PROMPTS = (
    "The capital of France is",
    "Water is made of",
    "The three primary colours are",
    "The old lighthouse keeper climbed the stairs and",
)
QUESTION = "In one sentence: why does ice float on water?"
"""Asked by the chat template, of a tokenizer that has one."""


class Sample(Result):
    """What a model wrote after one prompt."""

    prompt: str
    text: str
    """Without the prompt and special tokens."""


def write_samples(
    model: Path, tokens: int, dtype: str = "auto", device: str = "auto", tokenizer: Path | None = None
) -> list[Sample]:
    """Let a model write after each prompt, taking the likeliest token each time. It is in memory whole.

    Args:
        model: folder of a checkpoint or of a quantised model, or a GGUF file.
        tokens: the most to write; it ends before where the text does.
        dtype: what the layers compute in.
        device: where.
        tokenizer: folder that has it; the default is the model's.

    Raises:
        CameraError: if the model or its tokenizer cannot be loaded.
    """
    reader, network = load_tokenizer(tokenizer or model), load_model(model, dtype, device)
    samples = []
    with GuardedTokenizer(reader) as guarded:
        given = {prompt: guarded.encode(prompt) for prompt in PROMPTS}
        if reader.chat_template:
            asked = guarded.chat([{"role": "user", "content": QUESTION}])
            given[QUESTION] = guarded.encode(asked, add_special_tokens=False)
        for prompt, ids in given.items():
            if not ids:  # of a tokenizer that knows none of the characters
                continue
            prompt_BT = torch.tensor([ids], device=network.device)
            with torch.inference_mode():
                written_BT = network.generate(  # type: ignore[operator]
                    prompt_BT,
                    attention_mask=torch.ones_like(prompt_BT),
                    max_new_tokens=tokens,
                    do_sample=False,
                )
            text = guarded.decode(written_BT[0, len(ids) :].tolist(), skip_special_tokens=True)
            samples.append(Sample(prompt=prompt, text=text))
    return samples
