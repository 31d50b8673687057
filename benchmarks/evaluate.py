"""Time and peak memory of measuring a model layer by layer, against the whole model in memory.

    python benchmarks/evaluate.py MODEL [MODEL ...] --json evaluate.json

A MODEL is a checkpoint, a quantised folder or a GGUF file. Perplexity is measured on random tokens, both ways in turns, each in a
process of its own, whose peak resident set the kernel counts. With `--reference` also the divergence from that model. To
reach: the same loss within 1e-6 (1e-5 where tokens are routed to experts; in 16 bits within their rounding), no more CPU time
than whole, and at a 7B model's shapes at most 2 GB and the hidden states.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import apart, cpu, in_turns, parser_of, random_tokens, ratio, save, show, span, timed

from camera.devices import peak_memory_bytes
from camera.evaluation.divergence import divergence
from camera.evaluation.perplexity import perplexity
from camera.evaluation.text_model import open_text_model
from camera.units import bytes_text

WAYS = {"whole": False, "layer by layer": True}


def main() -> None:
    """Measure, print a table, and write JSON if asked."""
    parser = parser_of(__doc__, windows=4, window=128, vocab=256, threads=1, repeats=3, dtype="auto")
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL")
    parser.add_argument("--reference", type=Path, help="also measure the divergence from this model")
    arguments = parser.parse_args()
    rows = [measure(model, arguments) for model in arguments.models]
    show(
        f"{arguments.windows} windows of {arguments.window} tokens, {arguments.dtype}, {arguments.threads} thread",
        "model | CPU s whole | layer by layer | ratio | spread | peak whole | layer by layer | loss differs by",
        (
            (
                row["model"],
                *(f"{row['cpu'][way].median:.1f}" for way in WAYS),
                f"{row['ratio'].median:.2f}",
                span(row["ratio"]),
                *(bytes_text(row["peak_bytes"][way]) for way in WAYS),
                f"{row['differs']:.1e}",
            )
            for row in rows
        ),
    )
    save(arguments.json, rows=rows)


def measure(model: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Both ways in turns, each time in a fresh process."""
    works = {way: partial(apart, work, model, arguments, layers) for way, layers in WAYS.items()}
    turns = in_turns(works, arguments.repeats, warm_up=False)
    seconds = {way: [each["seconds"] for each in found] for way, found in turns.items()}
    whole, layers = (turns[way][0]["nll_sum"] for way in WAYS)
    return {
        "model": str(model),
        "cpu": {way: cpu(times) for way, times in seconds.items()},
        "ratio": ratio(*([used for _, used in seconds[way]] for way in reversed(WAYS))),
        "peak_bytes": {way: max(each["peak_bytes"] for each in found) for way, found in turns.items()},
        "differs": abs(layers / whole - 1),
        "turns": turns,
    }


def work(model: Path, arguments: argparse.Namespace, layer_by_layer: bool) -> dict[str, Any]:
    """What is measured, as `camera evaluate` does it."""
    torch.set_num_threads(arguments.threads)
    tokens_N = random_tokens(arguments.vocab, 1, arguments.windows * arguments.window)[0]
    how = {"window": arguments.window, "dtype": arguments.dtype, "device": "cpu"}
    found: dict[str, Any] = {}

    def evaluate() -> None:
        opened = open_text_model(model, arguments.dtype, "cpu", layer_by_layer)
        found["nll_sum"] = perplexity(opened, tokens_N, **how).nll_sum
        if arguments.reference is not None:
            compared = divergence(arguments.reference, opened, tokens_N, layer_by_layer=layer_by_layer, **how)
            found["divergence"] = compared.divergence

    found["seconds"] = timed(evaluate)
    return {**found, "peak_bytes": peak_memory_bytes(torch.device("cpu"))}


if __name__ == "__main__":
    main()
