"""What the scripts that train a tiny language model share: windows, schedule, the loop, and the measures beside it."""

import argparse
import csv
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

EVALUATE_EVERY = 100
_LONG_FROM = 0.85
"""Share of the steps on short windows; the rest are on long ones."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train."""

    steps: int
    tokens_per_step: int
    short: int
    """Tokens in a window of the first 85 % of the steps, and of the held-out text."""
    long: int
    """Tokens in a window of the rest."""
    peak_rate: float
    weight_decay: float


def windows(
    texts: list[str],
    encode: Callable[[str], list[int]],
    length: int,
    random: np.random.Generator,
    bos: int | None,
) -> Iterator[np.ndarray]:
    """Endless windows int64 [length]: each epoch shuffles the documents, joins them and cuts at a random phase.

    Half of the windows begin with `bos`, where there is one, because evaluation protocols differ in whether theirs do.
    """
    while True:
        order = random.permutation(len(texts))
        tokens = np.array(encode("\n\n".join(texts[i] for i in order)), dtype=np.int64)
        for start in range(int(random.integers(length)), len(tokens) - length + 1, length):
            window = tokens[start : start + length].copy()
            if bos is not None and random.random() < 0.5:
                window[0] = bos
            yield window


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 5 %, then a cosine down to 5 % of the peak."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


@torch.inference_mode()
def perplexity(model: torch.nn.Module, tokens: torch.Tensor, window: int) -> float:
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


def fit(
    model: torch.nn.Module,
    windows_of: Callable[[int], Iterator[np.ndarray]],
    held_out: torch.Tensor,
    schedule: Schedule,
) -> list[dict[str, float]]:
    """Train in fp32: 85 % of the steps on short windows, the rest on long ones. Returns the log's rows.

    Args:
        model: a causal language model of transformers, in float32.
        windows_of: from a length to endless windows, int64 [length].
        held_out: int64 [N]; its first 16 windows are measured now and then.
        schedule: steps, lengths and rates.
    """
    sources = {length: windows_of(length) for length in (schedule.short, schedule.long)}
    optimizer = optimizer_of(model, schedule.weight_decay)
    steps = schedule.steps
    rows: list[dict[str, float]] = []
    began = time.monotonic()
    for step in range(steps):
        length = schedule.long if step >= int(steps * _LONG_FROM) else schedule.short
        taken = [next(sources[length]) for _ in range(schedule.tokens_per_step // length)]
        batch = torch.from_numpy(np.stack(taken))
        rate = learning_rate(step, steps, schedule.peak_rate)
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
            "tokens": (step + 1) * schedule.tokens_per_step,
            "length": length,
            "loss": round(loss.item(), 5),
            "lr": round(rate, 8),
            "seconds": round(time.monotonic() - began, 2),
        }
        rows.append(row)
        if (step + 1) % EVALUATE_EVERY == 0 or step + 1 == steps:
            model.eval()
            measured = perplexity(model, held_out[: 16 * schedule.short], schedule.short)
            row["held_out_perplexity"] = round(measured, 3)
            model.train()
        if (step + 1) % 10 == 0 or step + 1 == steps:
            print(" ".join(f"{name}={value}" for name, value in row.items()), flush=True)
    return rows


def parser_of(text: str | None, *, steps: int, threads: int, rate: float) -> argparse.ArgumentParser:
    """The options of a script that trains, with its defaults."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="checkpoint folder to write; must not exist")
    add("--steps", type=int, default=steps, help="of training (default: %(default)s)")
    add("--seed", type=int, default=0, help="of weights and windows (default: %(default)s)")
    add("--threads", type=int, default=threads, help="CPU threads (default: %(default)s)")
    add("--lr", type=float, default=rate, help="peak learning rate (default: %(default)s)")
    add("--weight-decay", type=float, default=0.1, help="on matrices (default: %(default)s)")
    return parser


def make_repeatable(arguments: argparse.Namespace) -> None:
    """The same seed, threads and torch give the same weights."""
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)


def train(
    model: torch.nn.Module,
    windows_of: Callable[[int, np.random.Generator], Iterator[np.ndarray]],
    texts: tuple[int, torch.Tensor],
    sizes: tuple[int, int, int],
    arguments: argparse.Namespace,
    folder: Path,
) -> dict[str, Any]:
    """Train as the options say, and write the log. Returns what `training.json` says of any training.

    Args:
        model: a causal language model of transformers, in float32.
        windows_of: from a length and a random generator to endless windows, int64 [length].
        texts: how many tokens an epoch has, and the held-out tokens, int64 [N].
        sizes: tokens in a step, in a short window and in a long one.
        arguments: of `parser_of`.
        folder: for `training_log.csv`.
    """
    (epoch, held_out), began = texts, time.monotonic()
    schedule = Schedule(arguments.steps, *sizes, arguments.lr, arguments.weight_decay)
    random = np.random.default_rng(arguments.seed)
    rows = fit(model, lambda length: windows_of(length, random), held_out, schedule)
    seconds = time.monotonic() - began
    with (folder / "training_log.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "held_out_perplexity"], restval="")
        writer.writeheader()
        writer.writerows(rows)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seed": arguments.seed,
        "steps": schedule.steps,
        "tokens_seen": schedule.steps * schedule.tokens_per_step,
        "train_tokens": epoch,
        "test_tokens": len(held_out),
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
    }
