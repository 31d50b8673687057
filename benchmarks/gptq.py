"""What GPTQ costs at a model's shapes: seconds a decoder layer by part, and peak memory.

    python benchmarks/gptq.py --threads 2
    python benchmarks/gptq.py --device cuda

The default shapes are openPangu-7B's. Inputs and weights are random; the time does not depend on them. `moments` is the sum of
x·xᵀ over the tokens (of its passes through the layers nothing is counted), `factor` its factorisation, `rounding` the rest, up to
packed bytes and what is lost of the output. Seconds are on the clock and, in brackets, of CPU time of all threads. Every line is
measured in a process of its own; its peak memory includes Python and torch, about 0.4 GB, and on an accelerator is the device's.

`plain` is the paper's algorithm in a few lines of torch, each column rounded for all rows at once with the scale that plain
rounding takes, for `--plain-rows` rows of the o projection; `error` is what is lost of the output's RMS.
"""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import apart, parser_of, save, show, timed

from camera.devices import peak_memory_bytes, resolve_device, synchronize
from camera.layerwise.observers import sum_of_products
from camera.quantization.compensated_q4 import put_into, store_by_gptq
from camera.quantization.factor import factor_moments
from camera.registry import BLOCK_FORMATS

DAMPING = 0.01
_BATCH = 1024  # tokens


def main() -> int:
    """Run the command."""
    shape = {"hidden": 4096, "ffn": 12800, "keys": 1024, "layers": 34}
    how = {"type": "q4_0", "tokens": 1024, "device": "cpu", "threads": 1, "plain_rows": 512}
    arguments = parser_of(__doc__, **shape, **how).parse_args()
    given = vars(arguments)
    shapes = {
        "q, k, v": ([arguments.hidden, arguments.keys, arguments.keys], arguments.hidden),
        "o": ([arguments.hidden], arguments.hidden),
        "gate, up": ([arguments.ffn, arguments.ffn], arguments.hidden),
        "down": ([arguments.hidden], arguments.ffn),
    }
    found = {name: apart(measure, *shape, given) for name, shape in shapes.items()}
    parts = ("moments", "factor", "rounding")
    total = {
        part: tuple(map(sum, zip(*(each[part] for each in found.values()), strict=True))) for part in parts
    }
    lines = [
        (
            name,
            f"{sum(rows)} x {columns}",
            *(_said(found[name][part]) for part in parts),
            f"{found[name]['peak'] / 1e9:.2f}",
        )
        for name, (rows, columns) in shapes.items()
    ]
    show(
        f"GPTQ of a layer, {arguments.type}, {arguments.tokens} tokens, {arguments.threads} threads, {arguments.device}",
        "matrices | shape | moments s (CPU) | factor | rounding | peak GB",
        [
            *lines,
            (
                "a layer",
                "",
                *(_said(total[part]) for part in parts),
                f"{max(each['peak'] for each in found.values()) / 1e9:.2f}",
            ),
        ],
        left=2,
    )
    seconds = sum(each[0] for each in total.values())
    print(f"{seconds:.1f} s a layer, {seconds * arguments.layers / 60:.1f} minutes for {arguments.layers}")
    plain = apart(compare, given)
    print(
        f"{arguments.plain_rows} rows x {arguments.hidden} columns with their factor: {_said(plain['ours'])} s, error {plain['our_error']:.5f}; "
        f"plain {_said(plain['plain'])} s, error {plain['plain_error']:.5f}"
    )
    save(arguments.json, arguments={**given, "json": None}, groups=found, plain=plain)
    return 0


def measure(lengths: list[int], columns: int, given: dict[str, Any]) -> dict[str, Any]:
    """(Seconds, CPU seconds) of each part for matrices that share an input, and the peak memory in bytes."""
    torch.set_num_threads(given["threads"])
    device = resolve_device(given["device"])
    generator = torch.Generator().manual_seed(0)
    weights = {
        str(number): torch.randn(rows, columns, generator=generator).bfloat16()
        for number, rows in enumerate(lengths)
    }
    result: dict[str, Any] = {}

    def clocked(part: str, work: Callable[[], Any]) -> Any:
        made: list[Any] = []

        def all_of_it() -> None:
            made.append(work())
            synchronize(device)

        result[part] = timed(all_of_it)
        return made[0]

    batches = [batch_NI.to(device) for batch_NI in inputs(columns, given["tokens"]).split(_BATCH)]
    moments = [clocked("moments", lambda: sum_of_products(batches, columns, device))]
    factor = clocked("factor", lambda: factor_moments(moments.pop(), DAMPING))
    puts = {name: put_into(room(weight, given["type"])) for name, weight in weights.items()}
    clocked("rounding", lambda: store_by_gptq(weights, given["type"], puts, factor, torch.float32))
    return {**result, "peak": peak_memory_bytes(device)}


def compare(given: dict[str, Any]) -> dict[str, Any]:
    """Ours and the plain algorithm on the CPU, with the error of each."""
    torch.set_num_threads(given["threads"])
    columns = given["hidden"]
    weight = torch.randn(given["plain_rows"], columns, generator=torch.Generator().manual_seed(0))
    moments_II = sum_of_products([inputs(columns, given["tokens"])], columns, torch.device("cpu"))
    moments_II = moments_II.tril() + moments_II.tril(-1).T
    made: dict[str, torch.Tensor] = {}

    def ours() -> None:
        factor = factor_moments(moments_II.clone(), DAMPING)
        put = put_into(room(weight, given["type"]))
        stored = store_by_gptq({"": weight}, given["type"], {"": put}, factor, torch.float32)[""].numbers
        assert stored is not None
        made["ours"] = stored

    def plain() -> None:
        made["plain"] = plain_gptq(weight, moments_II, 32 if given["type"] == "q4_0" else 64)

    seconds = {"ours": timed(ours), "plain": timed(plain)}
    power = (weight.double() @ moments_II * weight).sum()
    errors = {
        name: ((stored - weight).double() @ moments_II * (stored - weight)).sum()
        for name, stored in made.items()
    }
    return {
        **seconds,
        "our_error": float((errors["ours"] / power).sqrt()),
        "plain_error": float((errors["plain"] / power).sqrt()),
    }


def plain_gptq(weight_RI: torch.Tensor, moments_II: torch.Tensor, length: int) -> torch.Tensor:
    """Frantar et al., 2022, algorithm 1; a block's scale is chosen when its first column comes."""
    damped_II = moments_II + DAMPING * moments_II.diagonal().mean() * torch.eye(len(moments_II))
    upper_II = torch.linalg.cholesky(torch.linalg.inv(damped_II), upper=True).float()
    rest_RI, stored_RI = weight_RI.clone(), torch.empty_like(weight_RI)
    for column in range(len(upper_II)):
        if column % length == 0:
            block_RL = rest_RI[:, column : column + length]
            extreme_R = block_RL.gather(1, block_RL.abs().argmax(1, keepdim=True))[:, 0]
            scale_R = (extreme_R / -8).half().float()
        stored_RI[:, column] = (rest_RI[:, column] / scale_R).round().clamp(-8, 7) * scale_R
        error_R = (rest_RI[:, column] - stored_RI[:, column]) / upper_II[column, column]
        rest_RI[:, column:].addr_(error_R, upper_II[column, column:], alpha=-1)
    return stored_RI


def room(weight: torch.Tensor, type: str) -> np.ndarray:
    """Memory for the bytes of a matrix."""
    return np.empty((len(weight), BLOCK_FORMATS[type].row_bytes(weight.shape[1])), np.uint8)


def inputs(columns: int, tokens: int) -> torch.Tensor:
    """Correlated inputs float32 [tokens, columns], always the same."""
    generator = torch.Generator().manual_seed(1)
    shared_NI = (
        torch.randn(tokens, 64, generator=generator) @ torch.randn(64, columns, generator=generator) / 8
    )
    return shared_NI + torch.randn(tokens, columns, generator=generator)


def _said(seconds: tuple[float, ...]) -> str:
    return f"{seconds[0]:.1f} ({seconds[1]:.1f})"


if __name__ == "__main__":
    sys.exit(main())
