"""The torch engine's attention: a key-value cache that is written in place, and heads that share keys packed together."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_NAME = "packed_sdpa"
_BOOLEAN_MASKS = ("npu",)
"""Devices whose fused attention takes masks of booleans alone."""
_POSITIONS_FIRST = ("npu",)
"""Devices whose fused attention wants the keys that it sees in one piece: all heads of a position lie together there."""


class GrowingLayer(CacheLayerMixin):
    """Keys and values of one decoder layer: [1, kv heads, capacity, head_dim], of which `length` positions count.

    transformers' StaticCache gives attention its whole capacity, so that token 1 costs as much as token 1024, and
    DynamicCache copies all it holds at every token. This one gives a view of what is filled; or, for a step whose shapes
    and addresses stay the same, of as many positions as `fix` says.
    """

    is_sliding = False

    def __init__(self, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.capacity = capacity
        self.length = 0
        self.position_1: torch.Tensor | None = None
        self.visible = 0

    def fix(self, position_1: torch.Tensor | None, visible: int = 0) -> None:
        """From now on write where a tensor says and show so many positions; or, with None, grow again.

        Args:
            position_1: int64 [1] on the device; below `visible`.
            visible: positions that attention sees; a mask must hide those behind the written one.
        """
        self.position_1, self.visible = position_1, visible

    @property
    def is_compileable(self) -> bool:  # type: ignore[override] # transformers then always makes a mask
        return self.position_1 is not None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = self._zeros(key_states), self._zeros(value_states)
        self.is_initialized = True

    def _zeros(self, states: torch.Tensor) -> torch.Tensor:
        batch, heads, _, width = states.shape
        if states.device.type in _POSITIONS_FIRST:
            return states.new_zeros((batch, self.capacity, heads, width)).transpose(1, 2)
        return states.new_zeros((batch, heads, self.capacity, width))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        if self.position_1 is not None:
            self.keys.index_copy_(2, self.position_1, key_states)
            self.values.index_copy_(2, self.position_1, value_states)
            return self.keys[:, :, : self.visible], self.values[:, :, : self.visible]
        end = self.length + key_states.shape[2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    @property
    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all positions, each [1, capacity, kv heads, width]."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys.transpose(1, 2), self.values.transpose(1, 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.length + query_length if self.position_1 is None else self.visible), 0

    def get_seq_length(self) -> int:
        length: Any = (
            self.length if self.position_1 is None else self.position_1
        )  # as transformers' StaticLayer
        found: int = length
        return found

    def get_max_length(self) -> int:
        return self.capacity


class GrowingCache(Cache):
    """One GrowingLayer for each decoder layer."""

    def __init__(self, config: PreTrainedConfig, capacity: int) -> None:
        self.growing = [GrowingLayer(capacity) for _ in range(config.num_hidden_layers)]
        super().__init__(layers=list(self.growing))

    def clear(self) -> None:
        """Forget every position, and grow; the memory stays."""
        for layer in self.growing:
            layer.length = 0
            layer.fix(None)

    def zero(self) -> None:
        """Overwrite what every position holds."""
        for layer in self.growing:
            for tensor in (layer.keys, layer.values):
                if tensor is not None:
                    tensor.zero_()

    @property
    def device(self) -> torch.device:
        """Where it is, once it has been filled."""
        return self.growing[0].rows[0].device

    def fix(self, position_1: torch.Tensor, visible: int) -> None:
        """`GrowingLayer.fix` of every layer."""
        for layer in self.growing:
            layer.fix(position_1, visible)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        tensors = (tensor for layer in self.growing for tensor in (layer.keys, layer.values))
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def packed_sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' `sdpa`, but for one query token: [B, heads, 1, D] against keys [B, kv heads, L, D].

    There transformers asks torch for `enable_gqa`, which on the CPU in bfloat16 takes ten times as long (18 ms
    against 1.6 for 32 query heads on 8 of width 128 at L = 1024, one thread of an EPYC with AVX-512). The heads that
    share a key are as well that many query tokens of one head.
    """
    batch, heads, length, width = query.shape
    kv_heads = key.shape[1]
    if length != 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    packed = query.reshape(batch, kv_heads, heads // kv_heads, width)
    out = F.scaled_dot_product_attention(
        packed,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=kwargs.get("dropout", 0.0),
        scale=kwargs.get("scaling"),
    )
    return out.reshape(batch, 1, heads, value.shape[-1]), None


def one_token_mask(*args: Any, dtype: torch.dtype, **kwargs: Any) -> torch.Tensor | None:
    """transformers' mask for `sdpa`; of one query token as numbers to add, which torch else makes of it in every layer."""
    mask = sdpa_mask(*args, dtype=dtype, **kwargs)
    if mask is None or mask.shape[-2] != 1 or mask.device.type in _BOOLEAN_MASKS:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


def use_packed_attention(model: PreTrainedModel) -> None:
    """Make a model decode with it."""
    AttentionInterface.register(_NAME, packed_sdpa)
    AttentionMaskInterface.register(_NAME, one_token_mask)
    model.set_attn_implementation(_NAME)
