"""Run on the stub by test_torch_npu.py: what torch_npu does with a few calls, printed as JSON by the name of each function."""

import json
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
import torch_npu  # type: ignore[import-not-found, unused-ignore]
from torch import Tensor

from tests.npu.process import mark

NZ = 29


def _refusal(call: Callable[[], object]) -> str:
    try:
        call()
        torch.npu.synchronize()
    except RuntimeError as error:
        return str(error)
    return ""


def _difference(seen: Tensor, expected: Tensor) -> float:
    return float((seen.float().cpu() - expected).abs().max() / expected.abs().max())


def double_precision() -> str:
    return str(torch.ones(2, device="npu").double().dtype)


def tiled_format() -> dict[str, object]:
    """Formats and products of one weight of four bits in every layout; relative errors."""
    generator = torch.Generator().manual_seed(0)
    rows, columns, group = 256, 128, 64
    weight_KN = torch.randint(-8, 8, (rows, columns), dtype=torch.int32, generator=generator)
    x = torch.randn(3, rows, generator=generator).half()
    scale = torch.rand(rows // group, columns, generator=generator).half()
    expected = x.float() @ (weight_KN * scale.float().repeat_interleave(group, 0))
    pack = torch_npu.npu_convert_weight_to_int4pack

    def product(packed: Tensor, **options: object) -> float:
        made = torch_npu.npu_weight_quant_batchmatmul(
            x.npu(), packed, scale.npu(), antiquant_group_size=group, **options
        )
        return _difference(made, expected)

    weight = weight_KN.npu()
    off = torch_npu.get_npu_format(torch_npu.npu_format_cast(weight, NZ))
    torch.npu.config.allow_internal_format = True
    cast = torch_npu.npu_format_cast(weight, NZ)
    cast_then_packed, packed_then_cast = pack(cast), torch_npu.npu_format_cast(pack(weight), NZ)
    narrow = torch.zeros(rows // 32, columns).half().npu()
    mark("tiled")
    product(cast_then_packed)
    mark("tiled in the wrong order")
    product(packed_then_cast)
    mark("layouts")
    return {
        "format without allow_internal_format": int(off),
        "format": int(torch_npu.get_npu_format(cast_then_packed)),
        "cast back": bool((torch_npu.npu_format_cast(cast, 2).cpu() == weight_KN).all()),
        "cast, then packed": product(cast_then_packed),
        "with inner_precise": product(cast_then_packed, inner_precise=1),
        "packed, then cast": product(packed_then_cast),
        "plain": product(pack(weight)),
        "transposed": product(pack(weight_KN.t().contiguous().npu()).t()),
        "tiled, groups of 32": _refusal(
            lambda: torch_npu.npu_weight_quant_batchmatmul(
                x.npu(), cast_then_packed, narrow, antiquant_group_size=32
            )
        ),
        "scale of another dtype": _refusal(
            lambda: torch_npu.npu_weight_quant_batchmatmul(
                x.npu(), pack(weight), scale.float().npu(), antiquant_group_size=group
            )
        ),
        "70,000 columns": _refusal(
            lambda: torch_npu.npu_weight_quant_batchmatmul(
                x.npu(),
                torch.zeros(rows, 70000 // 8, dtype=torch.int32, device="npu"),
                torch.zeros(rows // group, 70000, dtype=torch.float16, device="npu"),
                antiquant_group_size=group,
            )
        ),
    }


def fused_operators() -> dict[str, float]:
    """Relative errors of fused operators against their parts in float32."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).half()

    x, added, gamma = random(2, 64), random(2, 64), random(64)
    query, key, value = random(1, 4, 1, 32), random(1, 2, 16, 32), random(1, 2, 16, 32)
    unseen = torch.arange(16)[None, None, None] > 9
    attention = F.scaled_dot_product_attention(
        query.float(), *(t.float().repeat_interleave(2, 1) for t in (key, value)), attn_mask=~unseen
    )
    options = {"num_heads": 4, "num_key_value_heads": 2, "input_layout": "BNSD", "scale": 32**-0.5}
    on_card = [t.npu() for t in (query, key, value)]
    q, k, cos, sin = random(1, 5, 4, 32), random(1, 5, 2, 32), random(1, 5, 1, 32), random(1, 5, 1, 32)
    rotated = [
        t * cos.float() + torch.cat([-t[..., 16:], t[..., :16]], -1) * sin for t in (q.float(), k.float())
    ]
    turned = torch_npu.npu_apply_rotary_pos_emb(q.npu(), k.npu(), cos.npu(), sin.npu())
    normalised, _, total = torch_npu.npu_add_rms_norm(x.npu(), added.npu(), gamma.npu(), 1e-5)
    gate, up = x.float().chunk(2, -1)
    infer = torch_npu.npu_fused_infer_attention_score
    return {
        "sum of add_rms_norm": _difference(total, (x + added).float()),
        "add_rms_norm": _difference(normalised, F.rms_norm((x + added).float(), (64,), gamma.float(), 1e-5)),
        "rms_norm": _difference(
            torch_npu.npu_rms_norm(x.npu(), gamma.npu(), 1e-5)[0],
            F.rms_norm(x.float(), (64,), gamma.float(), 1e-5),
        ),
        "swiglu": _difference(torch_npu.npu_swiglu(x.npu()), F.silu(gate) * up),
        "attention with a mask": _difference(
            infer(*on_card, atten_mask=unseen.npu(), **options)[0], attention
        ),
        "attention to a length": _difference(
            infer(*on_card, actual_seq_lengths_kv=[10], **options)[0], attention
        ),
        "rotated queries": _difference(turned[0], rotated[0]),
        "rotated keys": _difference(turned[1], rotated[1]),
    }


def captured_graph() -> dict[str, object]:
    """What a graph computes from what its input holds when it is replayed."""
    x = torch.ones(3, device="npu")
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        y = x * 2 + 1
    replayed = []
    mark("replays")
    for number in (1.0, 2.0):
        x.fill_(number)
        graph.replay()
        replayed.append(y.tolist())

    def wait_inside() -> None:
        with torch.npu.graph(torch.npu.NPUGraph()):
            x.sum().item()

    return {"replayed": replayed, "waiting inside": _refusal(wait_inside)}


def two_cards() -> dict[str, object]:
    x = torch.arange(3.0, device="npu:1")
    return {
        "moved": (x.to("npu:0") + 1).tolist(),
        "mixed": _refusal(lambda: x + torch.ones(3, device="npu:0")),
    }


def memory() -> dict[str, int]:
    torch.npu.empty_cache()
    free, total = torch.npu.mem_get_info()
    torch.npu.reset_peak_memory_stats()
    kept = torch.empty(64 << 20, dtype=torch.uint8, device="npu")
    less = free - torch.npu.mem_get_info()[0]
    return {"total": total, "taken": less, "peak": torch.npu.max_memory_allocated() // kept.numel()}


def events() -> bool:
    begin, end = (torch.npu.Event(enable_timing=True) for _ in range(2))
    begin.record()
    torch.ones(64, 64, device="npu").sum()
    end.record()
    end.synchronize()
    return 0 < begin.elapsed_time(end) < 60_000


def not_in_the_stub() -> str:
    return _refusal(lambda: torch.bincount(torch.tensor([1], device="npu")))


FACTS = (
    *(double_precision, tiled_format, fused_operators, captured_graph, two_cards, memory, events),
    not_in_the_stub,
)

if __name__ == "__main__":
    sys.stdout.write(json.dumps({fact.__name__: fact() for fact in FACTS}) + "\n")
