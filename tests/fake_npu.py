"""A device named `npu` on the CPU: catches tensors on the wrong device, and int4 calls that break an operator's rules.

It says nothing about an NPU's speed or rounding. Every tensor of the device wraps one on the CPU; an operator that
mixes the two fails as it does on real hardware. `torch_npu` here has the operators of decoder layers, and of int4 in the
plain layouts of weights, computed by the book and refusing what the real ones refuse; the tiled layout is for the real
torch_npu (tests/npu).
"""

import enum
import importlib.machinery
import sys
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from camera.engines.parts import int4_choice
from camera.engines.parts.int4_trials import TrialsError

CPU = torch.device("cpu")
_torch_empty = torch.empty
_TAKES_BOTH_DEVICES = {
    "aten::copy_",
    "aten::_copy_from",
    "aten::index.Tensor",
    "aten::index",
    "aten::index_put_",
}


waits: list[str] = []
"""Operators that would have made the main thread wait for the device: reads, and copies that are not `non_blocking`."""


def _wait(name: str) -> None:
    if threading.current_thread() is threading.main_thread():
        waits.append(name)


class Event:
    """A mark in a stream. What waits for it must find it recorded."""

    def __init__(self) -> None:
        self.recorded = False

    def record(self, stream: "Stream") -> None:
        self.recorded = True

    def synchronize(self) -> None:
        """Nothing to wait for, as for an event of the real one that was never recorded."""


class Stream:
    """A queue of work; here work is done at once, and only the order of calls can be wrong."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device

    def wait_event(self, event: Event) -> None:
        assert event.recorded, "it would wait for nothing"


class _Streams(threading.local):
    def __init__(self) -> None:
        self.current = Stream()


_streams = _Streams()


@contextmanager
def _on_stream(stream: Stream) -> Iterator[None]:
    before, _streams.current = _streams.current, stream
    try:
        yield
    finally:
        _streams.current = before


class NpuTensor(torch.Tensor):
    """A tensor whose device is `npu:0` and whose numbers are in `host`."""

    host: torch.Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> "NpuTensor":
        made = torch.Tensor._make_wrapper_subclass(
            cls, host.size(), strides=host.stride(), dtype=host.dtype, device=torch.device("npu", 0)
        )
        made.host = host
        return made

    @classmethod
    def __torch_dispatch__(cls, op: Any, kinds: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = op._schema.name
        leaves, _ = tree_flatten((args, kwargs))
        if name not in _TAKES_BOTH_DEVICES:
            strangers = [
                leaf for leaf in leaves if type(leaf) is torch.Tensor and leaf.device == CPU and leaf.dim()
            ]
            if strangers:
                raise RuntimeError(f"{name}: expected all tensors on one device, found npu:0 and cpu")
        wrapper_of = {id(leaf.host): leaf for leaf in leaves if isinstance(leaf, NpuTensor)}
        to_cpu = name == "aten::_to_copy" and torch.device(kwargs.get("device") or "npu") == CPU
        if to_cpu or name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"):
            _wait(name)
        from_host = name == "aten::copy_" and not all(isinstance(each, NpuTensor) for each in args[:2])
        if from_host and not (kwargs.get("non_blocking") or args[2:3] == (True,)):
            _wait(name)
        result = op(*tree_map(_host, args), **tree_map(_host, kwargs))
        if name == "aten::copy_":
            return args[0]
        return result if to_cpu else tree_map(lambda value: _wrap(value, wrapper_of), result)

    def record_stream(self, stream: Stream) -> None:
        """The real one's takes no stream but its own kind."""
        assert stream is _streams.current, "for the stream that goes on to use the tensor"

    def __repr__(self) -> str:
        return f"NpuTensor({self.host!r})"


def _host(value: Any) -> Any:
    if isinstance(value, NpuTensor):
        return value.host
    return CPU if isinstance(value, torch.device) and value.type == "npu" else value


def _wrap(value: Any, wrapper_of: dict[int, NpuTensor]) -> Any:
    if not isinstance(value, torch.Tensor) or isinstance(value, NpuTensor):
        return value
    own = wrapper_of.get(id(value))  # an in-place operator gives back its own argument
    return NpuTensor(value) if own is None else own


@cache
def _install_device() -> tuple[types.ModuleType, list[torch.library.Library]]:
    """Register the device with torch, absent until a test has it: a registration lasts as long as the process."""
    _device_constructors()  # torch lists them once, and would list what a test puts in the place of one
    module = types.ModuleType("torch.npu")
    allocated = 64 << 30
    functions = {
        "is_available": lambda: False,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "device_count": lambda: 0,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "Stream": Stream,
        "Event": Event,
        "stream": _on_stream,
        "current_stream": lambda device=None: _streams.current,
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "mem_get_info": lambda device=None: (allocated, allocated),
        "get_device_name": lambda device=None: "Ascend910B1",
        "set_compile_mode": lambda jit_compile: None,
        "get_amp_supported_dtype": lambda: [torch.float16, torch.bfloat16],
    }
    for name, function in functions.items():
        setattr(module, name, function)
    _setup_privateuseone_for_python_backend(rename="npu", backend_module=module)
    aten = torch.library.Library("aten", "IMPL")
    for overload in ("empty.memory_format", "empty_strided"):
        aten.impl(overload, _factory(overload), "PrivateUse1")
    aten.impl("_copy_from", _copy_from, "PrivateUse1")
    aten.impl("_local_scalar_dense", lambda tensor: tensor.host.item(), "PrivateUse1")
    autocast = torch.library.Library("_", "IMPL")
    autocast.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    return module, [aten, autocast]  # a library that is collected takes its kernels with it


def _factory(overload: str) -> Any:
    name, _, variant = overload.partition(".")
    op = getattr(getattr(torch.ops.aten, name), variant or "default")

    def make(*args: Any, **kwargs: Any) -> NpuTensor:
        kwargs.pop("pin_memory", None)
        return NpuTensor(op(*args, **{**kwargs, "device": CPU}))

    return make


def _empty(*shape: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
    """torch's, without pinned memory, which only a real device can give."""
    return _torch_empty(*shape, **kwargs)


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    if not non_blocking:
        _wait("aten::_copy_from")
    _host(target).copy_(_host(source))
    return target


class Format(enum.IntEnum):
    """torch_npu's numbers of memory layouts; no other is made here."""

    ND = 2


def get_npu_format(tensor: torch.Tensor) -> Format:
    assert isinstance(tensor, NpuTensor), "the tensor must be on the NPU"
    return Format.ND


def npu_weight_quant_batchmatmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    antiquant_scale: torch.Tensor,
    antiquant_offset: torch.Tensor | None = None,
    quant_scale: torch.Tensor | None = None,
    quant_offset: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    antiquant_group_size: int = 0,
    inner_precise: int = 0,
    weight_dtype: int | None = None,
) -> torch.Tensor:
    """x [M, K] @ (q · scale), with q [K, N] packed along N, or along K in a transposed view, and a scale [K / group, N]."""
    for tensor in (x, weight, antiquant_scale):
        assert isinstance(tensor, NpuTensor), "every tensor must be on the NPU"
    assert antiquant_offset is None, "symmetric blocks have no offset"
    assert quant_scale is None, "the result is not quantised"
    group = antiquant_group_size
    assert x.dim() == 2, "x must be a matrix"
    assert x.dtype in (torch.float16, torch.bfloat16), f"x must be 16-bit, not {x.dtype}"
    assert antiquant_scale.dtype == x.dtype, "the scale must have x's dtype"
    assert weight.dtype == torch.int32, "int4 weights are packed in int32"
    transposed = not weight.is_contiguous()
    words = (weight.host.t() if transposed else weight.host).contiguous()
    nibbles = (words.to(torch.int64)[:, :, None] >> (4 * torch.arange(8))) & 0xF
    signed = torch.where(nibbles > 7, nibbles - 16, nibbles).flatten(1)
    signed = signed.t() if transposed else signed
    rows, columns = signed.shape
    assert x.shape[1] == rows, "x and the weight do not fit"
    assert antiquant_scale.is_contiguous() == (not transposed), "the scale must lie as the weight does"
    assert inner_precise in (0, 1), "there are two ways to compute"
    assert max(rows, columns) <= 65535, "K and N must be at most 65535"
    assert group % 32 == 0, "the group must be a multiple of 32"
    assert 32 <= group <= rows - 1, "the group must be from 32 to K - 1"
    assert tuple(antiquant_scale.shape) == (-(-rows // group), columns), "the scale must be [ceil(K / g), N]"
    if bias is not None:
        wanted = torch.float16 if x.dtype == torch.float16 else torch.float32
        assert bias.dtype == wanted, f"the bias must be {wanted}"
    scale = antiquant_scale.host.float().repeat_interleave(group, dim=0)[:rows]
    product = x.host.float() @ (signed.float() * scale)
    if bias is not None:
        product = product + bias.host.float()
    return NpuTensor(product.to(x.dtype))


def _of_half(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """What the operators of decoder layers take: on the NPU, in one piece, 16-bit and all alike; here in float32."""
    for tensor in tensors:
        assert isinstance(tensor, NpuTensor), "every tensor must be on the NPU"
        assert tensor.dtype == tensors[0].dtype, "all must have one dtype"
        assert tensor.dtype in (torch.float16, torch.bfloat16), f"they must be 16-bit, not {tensor.dtype}"
        assert tensor.host.is_contiguous(), "every tensor must be in one piece"
    return [tensor.host.float() for tensor in tensors]


def npu_rms_norm(x: torch.Tensor, gamma: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, None]:
    """x / sqrt(mean(x²) + epsilon) · gamma."""
    numbers, weight = _of_half(x, gamma)
    rate = torch.rsqrt(numbers.pow(2).mean(-1, keepdim=True) + epsilon)
    return NpuTensor((numbers * rate * weight).to(x.dtype)), None


def npu_add_rms_norm(
    x1: torch.Tensor, x2: torch.Tensor, gamma: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, None, torch.Tensor]:
    """The norm of a sum, and the sum."""
    first, second = _of_half(x1, x2)
    total = NpuTensor((first + second).to(x1.dtype))
    return npu_rms_norm(total, gamma, epsilon)[0], None, total


def npu_apply_rotary_pos_emb(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both [B, S, heads, D] rotated by halves, in their own memory."""
    _, _, cosine, sine = _of_half(query, key, cos, sin)
    assert query.shape[-1] in (64, 128), "heads are 64 or 128 wide"
    assert cos.shape == sin.shape == (*query.shape[:2], 1, query.shape[-1]), "cos and sin are [B, S, 1, D]"
    for states in (query, key):
        numbers = states.host.float()
        first, second = numbers.chunk(2, -1)
        states.host.copy_(numbers * cosine + torch.cat((-second, first), -1) * sine)
    return query, key


def npu_scatter_nd_update_(x: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor) -> torch.Tensor:
    """Write rows [n, ...] at indices [n, 1] of the first dimension."""
    _of_half(x, updates)
    assert indices.dim() == 2, "an index is a row"
    assert updates.shape == (len(indices), *x.shape[1:]), "a row for each index"
    x.host[indices.host[:, 0]] = updates.host
    return x


def npu_fused_infer_attention_score(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    atten_mask: torch.Tensor,
    num_heads: int,
    num_key_value_heads: int,
    scale: float,
    input_layout: str,
) -> tuple[torch.Tensor, None]:
    """Attention of one token to what the mask does not hide; all are [B, S, heads, D]."""
    assert input_layout == "BSND", "no other layout here"
    assert (query.shape[2], key.shape[2]) == (num_heads, num_key_value_heads), "heads are as said"
    assert atten_mask.dtype == torch.bool, "a mask of booleans"
    assert atten_mask.shape == (1, 1, 1, key.shape[1]), "the mask is [B, 1, 1, S]"
    q_BNSD, k_BMSD, v_BMSD = (states.transpose(1, 2) for states in _of_half(query, key, value))
    attended = torch.nn.functional.scaled_dot_product_attention(
        q_BNSD, k_BMSD, v_BMSD, attn_mask=~atten_mask.host, scale=scale, enable_gqa=True
    )
    return NpuTensor(attended.transpose(1, 2).contiguous().to(query.dtype)), None


def npu_swiglu(x: torch.Tensor) -> torch.Tensor:
    """silu(first half) · second half."""
    gate, up = _of_half(x)[0].chunk(2, -1)
    return NpuTensor((torch.nn.functional.silu(gate) * up).to(x.dtype))


_OPERATORS = (
    get_npu_format,
    npu_weight_quant_batchmatmul,
    npu_rms_norm,
    npu_add_rms_norm,
    npu_apply_rotary_pos_emb,
    npu_scatter_nd_update_,
    npu_fused_infer_attention_score,
    npu_swiglu,
)


def fake_torch_npu() -> types.ModuleType:
    """The module `torch_npu`, with the device registered."""
    _install_device()
    module = types.ModuleType("torch_npu")
    module.__spec__ = importlib.machinery.ModuleSpec("torch_npu", loader=None)
    for function in _OPERATORS:
        setattr(module, function.__name__, function)
    return module


@pytest.fixture
def npu(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """An NPU for one test: `resolve_device("npu")` finds it, and `auto` takes it. Gives the module `torch_npu`.

    It is this process's alone: no other can try kernels on it.
    """

    def refuse(*args: object) -> None:
        raise TrialsError("the emulated NPU is of one process")

    module = fake_torch_npu()
    monkeypatch.setattr(int4_choice, "try_layouts", refuse)
    monkeypatch.setitem(sys.modules, "torch_npu", module)
    monkeypatch.setattr(torch.get_device_module("npu"), "is_available", lambda: True)
    monkeypatch.setattr(torch.get_device_module("npu"), "device_count", lambda: 1)
    _device_constructors()  # remembers for good what `with torch.device(…)` acts on: the real torch.empty
    monkeypatch.setattr(torch, "empty", _empty)
    return module
