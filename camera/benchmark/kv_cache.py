"""A key-value cache that is allocated once and grows in place."""

from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin


class GrowingLayer(CacheLayerMixin):
    """Keys and values of one decoder layer: [1, kv heads, capacity, head_dim], of which `length` positions count.

    transformers' StaticCache gives attention its whole capacity, so that token 1 costs as much as token 1024, and
    DynamicCache copies all it holds at every token. This one gives a view of what is filled.
    """

    is_sliding = False

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads, _, width = key_states.shape
        self.keys = key_states.new_zeros((batch, heads, self.capacity, width))
        self.values = value_states.new_zeros((batch, heads, self.capacity, value_states.shape[-1]))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        end = self.length + key_states.shape[2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.capacity


class GrowingCache(Cache):
    """One GrowingLayer for each decoder layer."""

    def __init__(self, config: PreTrainedConfig, capacity: int) -> None:
        self.growing = [GrowingLayer(capacity) for _ in range(config.num_hidden_layers)]
        super().__init__(layers=list(self.growing))

    def clear(self) -> None:
        """Forget every position; the memory stays."""
        for layer in self.growing:
            layer.length = 0

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(
            tensor.nbytes
            for layer in self.growing
            for tensor in (layer.keys, layer.values)
            if tensor is not None
        )
