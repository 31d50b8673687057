"""Train the second mixture of experts of `benchmarks/moe_quality.py`: another family, router and corpus than the first.

    python scripts/train_moe.py --out .camera/quality/moe --texts ../shared/data/text

A DeepSeek-V2 of 1.7 million parameters: latent attention, the first of 4 layers dense, then 16 routed experts of width 64
and a shared one, 4 for a token, their softmax weights scaled and not renormalised. Trained from scratch on one core in
about five minutes on the stories before the last fifth of a sample of TinyStories. Balance is asked for as weakly as
DeepSeek does, so experts stay uneven. The text is not ours to give on, so the model is made where it is needed and not
kept in the repository. The same seed, threads and torch give the same weights.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import training
import transformers
from train_third import END, train_tokenizer

from camera.checkpoints.checkpoint import Checkpoint
from camera.data.sets.file import read
from camera.errors import CameraError
from camera.files import atomic_folder, write_json

SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "first_k_dense_replace": 1,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 64,
    "routed_scaling_factor": 4.0,
}
VOCAB_SIZE = 512
STORIES = "tinystories_sample.txt"
HELD_OUT = 0.2
"""Share of the stories, at the end, that are not trained on."""
BALANCE = 0.003
"""Weight of the loss that keeps experts even; DeepSeek-V2's own (arXiv 2405.04434, section 3.1.2)."""
SHORT, LONG = 256, 512
TOKENS_PER_STEP = 1024


class _Added(torch.autograd.Function):
    """Passes a tensor on, and adds a loss to whatever is minimised."""

    @staticmethod
    def forward(ctx: Any, passed: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        return passed.view_as(passed)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gradient, gradient.new_full((), BALANCE)


def balance(logits_TE: torch.Tensor, chosen_TK: torch.Tensor) -> torch.Tensor:
    """How uneven the experts are: 1 where each gets as many tokens and as much weight (arXiv 2401.06066, section 3.3)."""
    experts = logits_TE.shape[1]
    tokens_E = torch.bincount(chosen_TK.flatten(), minlength=experts) / chosen_TK.numel()
    return experts * (tokens_E * logits_TE.softmax(-1).mean(0)).sum()


def keep_balanced(model: torch.nn.Module) -> None:
    """Add the loss of every router to the model's, in training."""

    def add(router: torch.nn.Module, _: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        logits_TE, weight_TK, chosen_TK = output
        if router.training:
            weight_TK = _Added.apply(weight_TK, balance(logits_TE, chosen_TK))
        return logits_TE, weight_TK, chosen_TK

    for module in model.modules():
        if isinstance(module, transformers.models.deepseek_v2.modeling_deepseek_v2.DeepseekV2TopkRouter):
            module.register_forward_hook(add)


def stories(folder: Path) -> tuple[list[str], list[str]]:
    """What is trained on, and what is not.

    Raises:
        CameraError: if the file is missing.
    """
    (text,) = read(folder / STORIES, "text").texts
    found = [story.strip() for story in text.split(END) if story.strip()]
    count = round(len(found) * (1 - HELD_OUT))
    return found[:count], found[count:]


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything, into a folder that appears only when it is whole. Returns the content of training.json."""
    training.make_repeatable(arguments)
    train_texts, test_texts = stories(arguments.texts)
    with atomic_folder(arguments.out) as folder:
        config = transformers.DeepseekV2Config(
            **SHAPE, vocab_size=VOCAB_SIZE, eos_token_id=0, bos_token_id=0, pad_token_id=0
        )
        config.save_pretrained(folder)
        tokenizer = train_tokenizer(train_texts, folder, VOCAB_SIZE)

        def encode(text: str) -> list[int]:
            return tokenizer(text, verbose=False)["input_ids"]

        train_ids = np.array(encode("\n\n".join(train_texts)), dtype=np.int64)
        test_ids = np.array(encode("\n\n".join(test_texts)), dtype=np.int64)
        model = transformers.DeepseekV2ForCausalLM(config).float().train()
        model.set_experts_implementation("eager")
        keep_balanced(model)
        record = training.train(
            model,
            lambda length, random: training.windows(train_texts, encode, length, random, bos=None),
            (len(train_ids), torch.from_numpy(test_ids)),
            (TOKENS_PER_STEP, SHORT, LONG),
            arguments,
            folder,
        )
        model.to(torch.bfloat16).save_pretrained(folder)
        checkpoint = Checkpoint.open(folder)
        checkpoint.check_shapes()
        loaded = checkpoint.load_model(torch.float32)
        record |= {
            "held_out_perplexity": {
                "model": training.perplexity(loaded, torch.from_numpy(test_ids), SHORT),
                "unigram": training.unigram_perplexity(train_ids, test_ids, VOCAB_SIZE),
                "bigram": training.bigram_perplexity(train_ids, test_ids, VOCAB_SIZE),
            },
            "texts": [STORIES],
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
        write_json(folder / "training.json", record)
    return record


def main() -> None:
    """The command."""
    parser = training.parser_of(__doc__, steps=1000, threads=1, rate=4e-3)
    parser.add_argument("--texts", type=Path, required=True, help=f"folder with {STORIES}")
    arguments = parser.parse_args()
    try:
        record = run(arguments)
    except CameraError as error:
        parser.exit(2, f"{error}\n")
    print(json.dumps(record["held_out_perplexity"]))


if __name__ == "__main__":
    main()
