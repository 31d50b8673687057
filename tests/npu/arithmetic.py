"""Run on the stub by test_torch_npu.py: expressions that the CPU and the card must agree on, and those that they do not."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

EXPRESSIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sums": lambda x, y: x + y - 2 * x + 3 - (1 - y),
    "scaled": lambda x, y: torch.add(x, y, alpha=0.5).sub_(1).add_(y, alpha=2).mul_(0.5).div_(3),
    "broadcast": lambda x, y: x[:, :1] * y + x[0],
    "roots": lambda x, y: x.abs().sqrt() + x.square().add(1).rsqrt() + (y.abs() + 1).log() + x.exp() ** 0.5,
    "activations": lambda x, y: F.silu(x) + torch.sigmoid(y) + F.relu(x) + torch.tanh(y) + F.softplus(x),
    "waves": lambda x, y: x.cos() * y.sin(),
    "rounding": lambda x, y: x.round() + x.floor() + x.ceil() + x.trunc() + x.sign(),
    "floor division": lambda x, y: (x // (y.abs() + 1)) + x % 0.7,
    "comparisons": lambda x, y: ((x > y) & (x != 0) | ~(y <= 0.5)).float(),
    "choice": lambda x, y: (
        torch.where(x > 0, x, y) + x.clamp(-0.5, 0.5) + torch.maximum(x, y) + y.clamp(min=0)
    ),
    "filling": lambda x, y: (
        x.clone().masked_fill_(y > 0, -1.5) + torch.zeros_like(x).fill_(2) + torch.ones_like(y)
    ),
    "moving": lambda x, y: torch.cat([x, y.flip(0)], 1).t().contiguous() + torch.stack([x, y]).sum(),
    "picking": lambda x, y: (
        x[:, [2, 0, 1]] + x.index_select(1, torch.tensor([0, 1, 2], device=x.device)) + y[1, 2]
    ),
    "by mask": lambda x, y: x[y > 0].sum() + torch.nonzero(x > 0).sum(),
    "gathering": lambda x, y: x.gather(1, y.argsort(1)) + y.sort(1, descending=True).values,
    "putting": lambda x, y: x.clone().index_copy_(0, torch.tensor([1, 0], device=x.device), y[:2]),
    "putting by index": lambda x, y: x.clone().index_put_((torch.tensor([0, 1], device=x.device),), y[:2]),
    "triangles": lambda x, y: x.triu(1) + y.tril(),
    "reductions": lambda x, y: (
        x.sum(0) + x.mean(0) + x.amax(0) + x.amin(0) + x.norm(dim=0) + x.std(0) + x.var(0)
    ),
    "all reductions": lambda x, y: x.sum() + x.mean() + x.max() + x.min() + (x > 0).all() + (x > 0).any(),
    "maxima": lambda x, y: x.max(1).values + x.max(1).indices + x.argmax(1) + x.topk(2, 1).values.sum(1),
    "cumulated": lambda x, y: x.float().cumsum(1),
    "softmax": lambda x, y: F.softmax(x, -1) + F.log_softmax(y, -1) + x.logsumexp(1, keepdim=True),
    "loss": lambda x, y: F.cross_entropy(x.float(), y.argmax(1)),
    "matmul": lambda x, y: x @ y.t() + torch.addmm(x @ x.t(), x, y.t(), beta=0.5, alpha=2),
    "linear": lambda x, y: F.linear(x, y, y[:, 0]) + F.linear(x[None], y),
    "batches": lambda x, y: torch.bmm(x[None].expand(2, -1, -1), y.t()[None].expand(2, -1, -1)),
    "embedding": lambda x, y: F.embedding(y.argmax(1), x),
    "range": lambda x, y: x + torch.arange(x.shape[1], device=x.device),
    "integers": lambda x, y: ((x * 10).int() // 3 + ((y * 10).int() & 7) + ((x * 10).int() << 1)).float(),
    "bytes": lambda x, y: (x * 100).to(torch.int8).view(torch.uint8).float(),
    "attention": lambda x, y: F.scaled_dot_product_attention(x[None, None], y[None, None], y[None, None]),
}


def far(dtype: torch.dtype) -> dict[str, str]:
    """The expressions where the card is further from the CPU than rounding explains, with what went wrong."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, 3, generator=generator).to(dtype) for _ in range(2))
    found = {}
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for name, expression in EXPRESSIONS.items():
        try:
            expected, seen = expression(x, y), expression(x.npu(), y.npu())
            if seen.dtype != expected.dtype or seen.device.type != "npu":
                found[name] = f"{seen.dtype} on {seen.device}"
            torch.testing.assert_close(seen.cpu(), expected, rtol=tolerance, atol=tolerance)
        except (RuntimeError, AssertionError) as error:
            found[name] = str(error)[-600:]
    return found
