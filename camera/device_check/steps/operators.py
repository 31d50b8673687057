"""Every operator that the pipeline launches, on small tensors, against the CPU in float32.

The device may throw an exception, after which its process can compute nothing: the cases that are left go on in a new one.
"""

import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from camera.device_check.context import Context, read_lines
from camera.device_check.schema import Measurement
from camera.devices import dtype_name

_M, _K, _N = 16, 512, 192
_MOST_ENDINGS = 8
"""Processes that may end before the rest is given up."""
_TENSORS = (torch.float32, torch.bfloat16, torch.float16)
Run = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One operator, or a few that belong together."""

    run: Run
    """Given the inputs."""
    inputs: tuple[str, ...] = ("x_MK",)
    """Names in what `inputs` gives."""
    dtypes: tuple[torch.dtype, ...] = _TENSORS
    exact: bool = False
    """Whether every element must be the CPU's."""


def _attention(query: torch.Tensor, key: torch.Tensor, **how: Any) -> torch.Tensor:
    return F.scaled_dot_product_attention(query, key, key, enable_gqa=True, **how)


def _rms_norm(x: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


_FLOAT32 = (torch.float32,)
CASES: dict[str, Case] = {
    "matmul of one token": Case(lambda x, w: F.linear(x[:1], w), ("x_MK", "w_NK")),
    "matmul": Case(F.linear, ("x_MK", "w_NK")),
    "matmul with bias": Case(F.linear, ("x_MK", "w_NK", "b_N")),
    "batched matmul": Case(lambda x: torch.bmm(x, x.transpose(1, 2)), ("heads",)),
    "sum of products": Case(lambda x: x.new_ones((_K, _K)).addmm_(x.T, x), dtypes=_FLOAT32),
    "RMS norm": Case(_rms_norm),
    "fused RMS norm": Case(lambda x, g: F.rms_norm(x, (_K,), g, 1e-5), ("x_MK", "g_K")),
    "softmax": Case(lambda x: x.softmax(-1)),
    "log softmax": Case(lambda x: x.log_softmax(-1), dtypes=_FLOAT32),
    "logsumexp": Case(lambda x: x.logsumexp(-1), dtypes=_FLOAT32),
    "causal attention": Case(lambda q, k: _attention(q, k, is_causal=True), ("query", "key")),
    "attention with a mask": Case(lambda q, k, m: _attention(q, k, attn_mask=m), ("query", "key", "mask")),
    "attention of one token": Case(
        lambda q, k, m: _attention(q[:, :, :1], k, attn_mask=m[..., :1, :]), ("query", "key", "mask")
    ),
    "SiLU and product": Case(lambda x: F.silu(x) * x),
    "rotary embedding": Case(lambda x: x * x.cos() + x.roll(8, -1) * x.sin()),
    "addition, subtraction, quotient": Case(lambda x: (x + 2) / (x.abs() - x + 1)),
    "in place": Case(lambda x: x.clone().add_(1).mul_(2).sub_(x).div_(3)),
    "square root, exponential, power": Case(lambda x: x.abs().sqrt() + x.exp() + x.pow(2)),
    "maximum and clamp": Case(lambda x: torch.maximum(x, -x).clamp(0.1, 1.0)),
    "comparisons and logic": Case(
        lambda x: ((x > 0) & (x < 1)) | (x <= -1) | ~(x >= -2) | torch.isnan(x), exact=True
    ),
    "equal and unequal": Case(lambda x: (x == x.abs()) | (x != x.round()), exact=True),
    "powers of two": Case(
        lambda x: torch.exp2(-x.abs().clamp_min(0.01).log2().div(2).round()), dtypes=_FLOAT32
    ),
    "differences": Case(lambda i: i.diff(), ("rows",), (torch.int64,), exact=True),
    "reciprocal and logarithm": Case(lambda x: (x.abs() + 1).reciprocal() + (x.abs() + 1).log()),
    "square and exponential in place": Case(lambda x: x.clone().abs_().square_().neg().exp_()),
    "between two": Case(lambda x: x.lerp(-x, 0.25), dtypes=_FLOAT32),
    "smallest and largest of all": Case(lambda x: torch.stack((x.min(), x.max())), exact=True),
    "rounding": Case(
        lambda x: (x * 8).round() + (x * 8).floor() + (x * 8).ceil_(), dtypes=_FLOAT32, exact=True
    ),
    "sum": Case(lambda x: x.sum(0), dtypes=_FLOAT32),
    "mean": Case(lambda x: x.mean(-1)),
    "sum of squares": Case(lambda x: x.float().square().sum(0)),
    "largest magnitude": Case(lambda x: x.abs().amax(0), exact=True),
    "norm": Case(lambda x: x.norm(dim=-1), dtypes=_FLOAT32),
    "finite": Case(lambda x: torch.isfinite(x).all(), exact=True),
    "any": Case(lambda x: (x > 3).any(0), exact=True),
    "argmax": Case(lambda x: x.argmax(-1), dtypes=_FLOAT32, exact=True),
    "sort": Case(lambda x: torch.stack([each.float() for each in x.sort(-1)]), dtypes=_FLOAT32, exact=True),
    "argsort, descending": Case(lambda x: x.argsort(-1, descending=True), dtypes=_FLOAT32, exact=True),
    "topk": Case(lambda x: x.topk(8, -1).values, dtypes=_FLOAT32, exact=True),
    "cumulative sum": Case(lambda x: x.cumsum(-1), dtypes=_FLOAT32),
    "embedding": Case(lambda w, i: F.embedding(i, w), ("w_NK", "rows"), exact=True),
    "rows by index": Case(lambda x, i: x.index_select(0, i), ("w_NK", "rows"), exact=True),
    "columns by index": Case(lambda x, i: x[:, i], ("x_MK", "rows"), exact=True),
    "index copy": Case(lambda x, w, i: w.clone().index_copy_(0, i, x), ("x_MK", "w_NK", "rows"), exact=True),
    "index add": Case(lambda x, w, i: w.clone().index_add_(0, i, x), ("x_MK", "w_NK", "rows")),
    "gather": Case(lambda x: x.gather(-1, x.argsort(-1)), dtypes=_FLOAT32, exact=True),
    "scatter": Case(
        lambda x: torch.zeros_like(x).scatter_(-1, x.argsort(-1), x), dtypes=_FLOAT32, exact=True
    ),
    "masked fill": Case(
        lambda x: x.masked_fill(x > 0, -1.0) + x.clone().masked_fill_(x > 0, -1.0), exact=True
    ),
    "where": Case(lambda x: torch.where(x > 0, x, 2 * x), exact=True),
    "transposed copy": Case(lambda x: x.t().contiguous(), exact=True),
    "joined and stacked": Case(lambda x: torch.stack((torch.cat((x, x)), torch.cat((x, -x)))), exact=True),
    "repeated": Case(lambda x: x.repeat_interleave(3, 0), exact=True),
    "part copied": Case(
        lambda x: torch.zeros((_M, 2 * _K), dtype=x.dtype, device=x.device)[:, _K:].copy_(x), exact=True
    ),
    "cast to bfloat16": Case(lambda x: x.bfloat16(), exact=True, dtypes=_FLOAT32),
    "cast to float16": Case(lambda x: x.half(), exact=True, dtypes=_FLOAT32),
    "cast to float32": Case(lambda x: x.float(), exact=True),
    "cast to bytes": Case(
        lambda x: (x * 8).round().clamp(0, 15).to(torch.uint8), exact=True, dtypes=_FLOAT32
    ),
    "low nibbles": Case(lambda b: b & 15, ("bytes",), (torch.uint8,), exact=True),
    "high nibbles": Case(lambda b: b >> 4, ("bytes",), (torch.uint8,), exact=True),
    "nibbles joined": Case(lambda b: (b & 15) | (b << 4), ("bytes",), (torch.uint8,), exact=True),
    "signs flipped": Case(lambda b: b ^ 8, ("bytes",), (torch.uint8,), exact=True),
    "bytes as scales": Case(lambda h: h.view(torch.uint8), ("x_MK",), (torch.float16,), exact=True),
    "down to the host": Case(lambda x: x.cpu(), exact=True),
    "ranges and constants": Case(
        lambda x: torch.arange(9, device=x.device) + torch.full((9,), 3, device=x.device).fill_(4), exact=True
    ),
    "lower triangle": Case(lambda x: x[:, :_M].tril(), exact=True),
}
"""By what people call them."""


def run(context: Context) -> None:
    """Measure each case in each of its dtypes."""
    waiting = [f"{name}, {dtype_name(dtype)}" for name, case in CASES.items() for dtype in case.dtypes]
    spawn = multiprocessing.get_context("spawn")
    for _ in range(_MOST_ENDINGS):
        process = spawn.Process(target=measure, args=(context, waiting))
        process.start()
        process.join()
        told = [line.measurement for line in read_lines(context.findings) if line.measurement]
        seen = {f"{one.of['operator']}, {one.of['dtype']}" for one in told}
        waiting = [each for each in waiting if each not in seen]
        if not waiting:
            return
        if process.exitcode != _LOST:
            culprit, _, dtype = waiting.pop(0).rpartition(", ")
            reason = f"its process ended by code {process.exitcode}"
            context.add(_of(culprit, dtype, error=reason))
    for each in waiting:
        context.add(_of(*each.rsplit(", ", 1), error="not tried: too many processes ended"))


_LOST = 3
"""Exit code: the device computes nothing any more."""


def measure(context: Context, waiting: Sequence[str], cases: Mapping[str, Case] = CASES) -> None:
    """Some of the cases, by name and dtype, in order.

    Raises:
        SystemExit: with the code that says so, if the device computes nothing any more.
    """
    device, given = context.device, inputs()
    for each in waiting:
        name, _, dtype = each.rpartition(", ")
        case = cases[name]
        chosen = [_cast(given[label], getattr(torch, dtype)) for label in case.inputs]
        try:
            found = case.run(*(each.to(device) for each in chosen)).cpu()
        except Exception as error:  # whatever the device makes of it
            context.add(_of(name, dtype, error=f"{type(error).__name__}: {error}".strip()))
            if not _computes(device):
                raise SystemExit(_LOST) from None
            continue
        if case.exact:
            differing = float((found != case.run(*chosen)).float().mean())
            context.add(_of(name, dtype, value=differing, at_most=0.0))
        else:
            expected = case.run(*(_cast(each, torch.float32) for each in chosen)).float()
            error_ratio = float((found.float() - expected).norm() / expected.norm())
            context.add(_of(name, dtype, value=error_ratio, at_most=_bound(getattr(torch, dtype))))


def _bound(dtype: torch.dtype) -> float:
    """The relative error that rounding explains: of a few operations in the dtype, sums of products being in float32."""
    return 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps


def _of(name: str, dtype: str, **found: Any) -> Measurement:
    what = "differing elements" if name in CASES and CASES[name].exact else "relative error"
    return Measurement(what=what, of={"operator": name, "dtype": dtype}, **found)


def _computes(device: torch.device) -> bool:
    try:
        return float((torch.ones(2, device=device) + 1).sum()) == 4
    except Exception:  # as above
        return False


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def inputs() -> dict[str, torch.Tensor]:
    """What cases are given, by name: float32, indices and bytes, on the CPU; always the same."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    hidden = torch.zeros((1, 1, _M, _M)).masked_fill(torch.ones(_M, _M).triu(1).bool(), float("-inf"))
    return {
        "x_MK": normal(_M, _K),
        "w_NK": normal(_N, _K) / _K**0.5,
        "b_N": normal(_N),
        "g_K": normal(_K),
        "heads": normal(4, _M, 64),
        "query": normal(1, 8, _M, 64),
        "key": normal(1, 2, _M, 64),
        "mask": hidden,
        "rows": torch.randperm(_N, generator=random)[:_M],
        "bytes": torch.randint(256, (_M, _K), generator=random, dtype=torch.uint8),
    }
