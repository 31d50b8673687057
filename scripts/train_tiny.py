"""Train the tiny openPangu model that the tests, the quick start and the nightly run work on.

    python scripts/train_tiny.py --out data/models/tiny-openpangu

A real language model of about 3.6 million parameters in the file layout of openPangu-Embedded, trained from scratch on
the `train` part of the built-in dataset and measured on its `test` part. Beside the checkpoint it writes
`training_log.csv` and `training.json`. The same seed, threads, Python and torch give the same weights.
"""

import argparse
import csv
import math
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
import train_tiny_tokenizer as tiny_tokenizer
import transformers
from torch.nn.functional import cross_entropy

from camera.checkpoints.checkpoint import INDEX_NAME, Checkpoint
from camera.checkpoints.safetensors_file import write_tensors
from camera.data import stdlib
from camera.files import whole_folder, write_json
from camera.models.pangu_embedded import PanguEmbeddedConfig, PanguEmbeddedForCausalLM

SHAPE: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 640,
    "max_position_embeddings": 2048,
    "num_attention_heads": 6,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
}
SHARD_BYTES = 3_000_000
TOKENS_PER_STEP = 2048
SHORT, LONG = 512, 2048
EVALUATE_EVERY = 100
BOS = 1


def config_json(vocab_size: int, eos: int) -> dict[str, Any]:
    """config.json with the keys, and their order, of the published openPangu-Embedded-7B."""
    return {
        "architectures": ["PanguEmbeddedForCausalLM"],
        "bias": True,
        "attention_dropout": 0.0,
        "bos_token_id": BOS,
        "pad_token_id": 0,
        "eos_token_id": eos,
        "hidden_act": "silu",
        "hidden_size": SHAPE["hidden_size"],
        "initializer_range": 0.02,
        "intermediate_size": SHAPE["intermediate_size"],
        "max_position_embeddings": SHAPE["max_position_embeddings"],
        "model_type": "PanguEmbedded",
        "num_attention_heads": SHAPE["num_attention_heads"],
        "num_hidden_layers": SHAPE["num_hidden_layers"],
        "num_key_value_heads": SHAPE["num_key_value_heads"],
        "rms_norm_eps": 1e-05,
        "rope_theta": 16000000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": transformers.__version__,
        "use_cache": True,
        "vocab_size": vocab_size,
    }


def windows(
    texts: list[str],
    processor: sentencepiece.SentencePieceProcessor,
    length: int,
    random: np.random.Generator,
) -> Iterator[np.ndarray]:
    """Endless windows int64 [length]: each epoch shuffles the documents, joins them and cuts at a random phase.

    Half of the windows begin with `<s>`, because evaluation protocols differ in whether theirs do.
    """
    while True:
        order = random.permutation(len(texts))
        tokens = np.array(processor.encode("\n\n".join(texts[i] for i in order)), dtype=np.int64)
        for start in range(int(random.integers(length)), len(tokens) - length + 1, length):
            window = tokens[start : start + length].copy()
            if random.random() < 0.5:
                window[0] = BOS
            yield window


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 5 %, then a cosine down to 5 % of the peak."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


@torch.inference_mode()
def perplexity(model: PanguEmbeddedForCausalLM, tokens: torch.Tensor, window: int) -> float:
    """exp of the mean loss in fp32 over whole windows of `tokens`, each without its first token."""
    loss, count = 0.0, 0
    for ids in tokens[: len(tokens) // window * window].view(-1, 1, window):
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        loss += cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += window - 1
    return math.exp(loss / count)


def unigram_perplexity(train: np.ndarray, test: np.ndarray, vocab_size: int) -> float:
    """Perplexity of the train part's token frequencies, one count added to each."""
    counts = np.bincount(train, minlength=vocab_size) + 1.0
    return float(np.exp(-np.log(counts / counts.sum())[test].mean()))


def bigram_perplexity(train: np.ndarray, test: np.ndarray, vocab_size: int) -> float:
    """Perplexity of the train part's bigrams with absolute discounting (0.75) towards the unigram."""
    discount = 0.75
    unigram = np.bincount(train, minlength=vocab_size) + 1.0
    unigram /= unigram.sum()
    pairs = np.zeros((vocab_size, vocab_size), dtype=np.float32)
    np.add.at(pairs, (train[:-1], train[1:]), 1)
    total, kinds = pairs.sum(1), (pairs > 0).sum(1)
    before, after = test[:-1], test[1:]
    seen = total[before] > 0
    direct = np.maximum(pairs[before, after] - discount, 0) / np.maximum(total[before], 1)
    backoff = np.where(seen, discount * kinds[before] / np.maximum(total[before], 1), 1.0)
    return float(np.exp(-np.log(direct + backoff * unigram[after]).mean()))


def optimizer_of(model: torch.nn.Module, decay: float) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


def train(
    model: PanguEmbeddedForCausalLM,
    texts: list[str],
    processor: sentencepiece.SentencePieceProcessor,
    held_out: torch.Tensor,
    arguments: argparse.Namespace,
) -> list[dict[str, float]]:
    """Train in fp32: 85 % of the steps on short windows, the rest on long ones. Returns the log's rows."""
    random = np.random.default_rng(arguments.seed)
    sources = {length: windows(texts, processor, length, random) for length in (SHORT, LONG)}
    optimizer = optimizer_of(model, arguments.weight_decay)
    long_from = int(arguments.steps * 0.85)
    rows: list[dict[str, float]] = []
    began = time.monotonic()
    for step in range(arguments.steps):
        length = LONG if step >= long_from else SHORT
        batch = torch.from_numpy(np.stack([next(sources[length]) for _ in range(TOKENS_PER_STEP // length)]))
        rate = learning_rate(step, arguments.steps, arguments.lr)
        for group in optimizer.param_groups:
            group["lr"] = rate
        logits = model(input_ids=batch, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        row = {
            "step": step + 1,
            "tokens": (step + 1) * TOKENS_PER_STEP,
            "length": length,
            "loss": round(loss.item(), 5),
            "lr": round(rate, 8),
            "seconds": round(time.monotonic() - began, 2),
        }
        rows.append(row)
        if (step + 1) % EVALUATE_EVERY == 0 or step + 1 == arguments.steps:
            model.eval()
            row["held_out_perplexity"] = round(perplexity(model, held_out[: 16 * SHORT], SHORT), 3)
            model.train()
        if (step + 1) % 10 == 0 or step + 1 == arguments.steps:
            print(" ".join(f"{name}={value}" for name, value in row.items()), flush=True)
    return rows


def tensors_of(model: PanguEmbeddedForCausalLM) -> dict[str, torch.Tensor]:
    """The weights in bf16, and each layer's rotary frequencies in fp32 as the published checkpoint holds them."""
    config = model.config
    theta = config_json(0, 0)["rope_theta"]
    inverse = 1.0 / theta ** (torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
    tensors = {name: tensor.detach().to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    for layer in range(config.num_hidden_layers):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = inverse.clone()
    return tensors


def write_weights(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Shards of about SHARD_BYTES in layer order, and their index."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, tensor in sorted(tensors.items(), key=lambda item: _layer_order(item[0])):
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_tensors(folder / file, shard)
        places.update(dict.fromkeys(shard, file))
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(
        folder / INDEX_NAME,
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))},
    )


def _layer_order(name: str) -> tuple[int, int, str]:
    """Sort key: embedding, decoder layers by number, final norm and head."""
    if name.startswith("model.layers."):
        return 1, int(name.split(".")[2]), name
    return (0 if "embed" in name else 2), 0, name


def write_generation_config(folder: Path, eos: int) -> None:
    """generation_config.json with the keys of the published one."""
    write_json(
        folder / "generation_config.json",
        {
            "_from_model_config": True,
            "do_sample": True,
            "bos_token_id": BOS,
            "pad_token_id": 0,
            "eos_token_id": eos,
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 0.8,
            "transformers_version": transformers.__version__,
        },
    )


def measure(folder: Path, train_ids: np.ndarray, test_ids: np.ndarray) -> dict[str, float]:
    """Held-out perplexity of what was written, loaded as a user would, and of the two baselines."""
    checkpoint = Checkpoint.open(folder)
    checkpoint.check_shapes()
    model = checkpoint.load_model(torch.float32)
    tokens = torch.from_numpy(test_ids)
    vocab_size = checkpoint.config["vocab_size"]
    return {
        f"model_window_{LONG}": perplexity(model, tokens, LONG),
        f"model_window_{SHORT}": perplexity(model, tokens, SHORT),
        "unigram": unigram_perplexity(train_ids, test_ids, vocab_size),
        "bigram": bigram_perplexity(train_ids, test_ids, vocab_size),
    }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything, into a folder that appears only when it is whole. Returns the content of training.json."""
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    train_texts, test_text = stdlib.read("train").texts, stdlib.read("test").joined
    with whole_folder(arguments.out) as folder:
        processor = tiny_tokenizer.write(folder, tiny_tokenizer.train(train_texts))
        eos = processor.piece_to_id("[unused10]")
        config = config_json(processor.get_piece_size(), eos)
        write_json(folder / "config.json", config)
        write_generation_config(folder, eos)
        train_ids = np.array(processor.encode("\n\n".join(train_texts)), dtype=np.int64)
        test_ids = np.array(processor.encode(test_text), dtype=np.int64)
        model = PanguEmbeddedForCausalLM(PanguEmbeddedConfig.from_pretrained(folder)).float().train()
        began = time.monotonic()
        rows = train(model, train_texts, processor, torch.from_numpy(test_ids), arguments)
        seconds = time.monotonic() - began
        write_weights(folder, tensors_of(model))
        with (folder / "training_log.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], "held_out_perplexity"], restval="")
            writer.writeheader()
            writer.writerows(rows)
        record = {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "seed": arguments.seed,
            "steps": arguments.steps,
            "tokens_seen": arguments.steps * TOKENS_PER_STEP,
            "train_tokens": len(train_ids),
            "test_tokens": len(test_ids),
            "seconds": round(seconds, 1),
            "threads": arguments.threads,
            "peak_learning_rate": arguments.lr,
            "weight_decay": arguments.weight_decay,
            "held_out_perplexity": measure(folder, train_ids, test_ids),
            "dataset": stdlib.read("train").source,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "sentencepiece": sentencepiece.__version__,
            },
        }
        write_json(folder / "training.json", record)
    return record


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to write; must not exist")
    parser.add_argument("--steps", type=int, default=2000, help="steps of 2048 tokens (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and windows (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="on matrices (default: %(default)s)")
    print(run(parser.parse_args())["held_out_perplexity"])


if __name__ == "__main__":
    main()
