"""What devices compute in one launch of whole parts of a decoder layer; the host launches them, and launches take time."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch


class Norm(NamedTuple):
    """A root-mean-square norm."""

    weight: torch.Tensor
    eps: float


class Place(NamedTuple):
    """Where a step is; made once and read by all layers."""

    position_1: torch.Tensor
    visible: int
    hidden_111L: torch.Tensor
    """True at positions that attention must not see."""
    cos_111D: torch.Tensor
    sin_111D: torch.Tensor


class Operators(Protocol):
    """What a device computes in one launch; x is 16-bit, [1, 1, ...] of one token."""

    dtypes: tuple[torch.dtype, ...]
    head_dims: tuple[int, ...]

    def norm(self, x: torch.Tensor, norm: Norm) -> torch.Tensor: ...

    def add_norm(
        self, x: torch.Tensor, branch: torch.Tensor, norm: Norm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum, and the sum normed."""

    def rotate(
        self, query_11ND: torch.Tensor, key_11ND: torch.Tensor, place: Place
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both rotated to their position, perhaps in their own memory."""

    def write(self, memory_1SND: torch.Tensor, row_11ND: torch.Tensor, place: Place) -> None:
        """Put a row at its position."""

    def attend(
        self, query_11ND: torch.Tensor, seen: tuple[torch.Tensor, torch.Tensor], scale: float, place: Place
    ) -> torch.Tensor:
        """What the heads read from keys and values, each [1, visible, kv heads, D]: [1, 1, heads, D]."""

    def gated(self, gate_and_up: torch.Tensor) -> torch.Tensor:
        """silu(first half) · second half."""


class NpuOperators:
    """torch_npu's."""

    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)
    head_dims: tuple[int, ...] = (64, 128)

    def __init__(self) -> None:
        self._npu: Any = importlib.import_module("torch_npu")

    def norm(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        normed: torch.Tensor = self._npu.npu_rms_norm(x, norm.weight, epsilon=norm.eps)[0]
        return normed

    def add_norm(
        self, x: torch.Tensor, branch: torch.Tensor, norm: Norm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normed, _, total = self._npu.npu_add_rms_norm(x, branch, norm.weight, epsilon=norm.eps)
        return total, normed

    def rotate(
        self, query_11ND: torch.Tensor, key_11ND: torch.Tensor, place: Place
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rotated: tuple[torch.Tensor, torch.Tensor] = self._npu.npu_apply_rotary_pos_emb(
            query_11ND, key_11ND, place.cos_111D, place.sin_111D
        )
        return rotated

    def write(self, memory_1SND: torch.Tensor, row_11ND: torch.Tensor, place: Place) -> None:
        self._npu.npu_scatter_nd_update_(memory_1SND[0], place.position_1[None], row_11ND[0])

    def attend(
        self, query_11ND: torch.Tensor, seen: tuple[torch.Tensor, torch.Tensor], scale: float, place: Place
    ) -> torch.Tensor:
        # No lengths: they are numbers of the host, which a recorded graph would keep as they were.
        attended: torch.Tensor = self._npu.npu_fused_infer_attention_score(
            query_11ND,
            *seen,
            atten_mask=place.hidden_111L,
            num_heads=query_11ND.shape[2],
            num_key_value_heads=seen[0].shape[2],
            scale=scale,
            input_layout="BSND",
        )[0]
        return attended

    def gated(self, gate_and_up: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self._npu.npu_swiglu(gate_and_up)
        return out


OPERATORS: dict[str, Callable[[], Operators]] = {"npu": NpuOperators}
"""By the kind of device. CUDA has none: there layers are compiled, which fuses the same."""
