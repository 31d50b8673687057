"""A causal model as measurements on text see it: final hidden states and an output head.

The model is whole in memory, or its decoder layers run one after the other, each with its weights read just before.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from camera.checkpoints.checkpoint import Checkpoint
from camera.devices import free_memory_bytes, resolve_device, resolve_dtype
from camera.errors import CameraError
from camera.evaluation.head import Logits, finished, slice_rows
from camera.evaluation.packed_checkpoint import PackedCheckpoint
from camera.formats.quantized_model import SUMMARY_NAME
from camera.layerwise.experts_pass import Buffers, ExpertsPass
from camera.layerwise.feed_forward import Samples
from camera.layerwise.observers import final_norm
from camera.layerwise.runner import LayerRunner
from camera.loading import load_model
from camera.models import FAMILIES
from camera.models.scales import Scales

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WHOLE_SHARE = 0.5
"""A model that takes more of an accelerator's free memory runs layer by layer; on the CPU every model does."""
HIDDEN_SHARE = 0.25
"""Of the host's free memory: what the hidden states of the windows may take that go through the layers at once."""
HIDDEN_BYTES = 512 << 20
"""On the CPU no more than that: 65,536 tokens of a 7B model, beside whose computing reading the weights again is nothing."""
ACTIVATION_BYTES = 256 << 20
"""On the CPU, of a batch in a feed-forward network: larger batches are no faster there (3500 tokens of a 7B model in 16 bits)."""
SPARSE_COPIES = 3
"""Of the hidden states, where tokens are routed to experts: as they are, as the experts read them, what these put out."""

Advance = Callable[[int], None]
"""Called with windows as they pass a layer."""


class TextModel(ABC):
    """A model to measure."""

    dtype: torch.dtype
    """What layers compute in."""
    device: torch.device
    vocabulary: int
    """Rows of the embedding."""
    positions: int
    """Most tokens of a window."""
    token_bytes: int
    """What `hidden` takes for a token."""
    layers: int = 0
    """How often `hidden` tells that a window has passed a layer; 0 if all layers are in memory."""
    slice_rows: int
    """See `Headed`."""

    @abstractmethod
    def hidden(self, windows_WT: torch.Tensor, batch_size: int, advance: Advance) -> torch.Tensor:
        """What the output head reads, [W, T, H] on any device."""

    @abstractmethod
    def head(self, first: int, stop: int) -> Logits:
        """See `Headed`."""

    @abstractmethod
    def states(self, windows_WT: torch.Tensor) -> Iterator[torch.Tensor]:
        """The hidden states [W, T, H] after each decoder layer."""


def hidden_room(devices: Sequence[torch.device]) -> int:
    """Bytes that hidden states may take on the host which go through layers on such devices together."""
    room = int(HIDDEN_SHARE * free_memory_bytes(torch.device("cpu")))
    return min(room, HIDDEN_BYTES) if all(device.type == "cpu" for device in devices) else room


def windows_at_once(models: Sequence[TextModel], length: int, batch_size: int) -> int:
    """How many windows of so many tokens go through the layers of models together: a batch if the layers are in memory, else
    as many as their hidden states have room for, so that weights are read seldom."""
    if not any(model.layers for model in models):
        return batch_size
    room = hidden_room([model.device for model in models])
    return max(1, room // (length * sum(model.token_bytes for model in models)) // batch_size) * batch_size


def open_text_model(
    model: "TextModel | PreTrainedModel | Path | str",
    dtype: str = "auto",
    device: str = "auto",
    layer_by_layer: bool | None = None,
) -> TextModel:
    """Open what is measured.

    Args:
        model: what `camera.loading.load_model` opens; or a model that is open already, which stays as it is.
        dtype, device: as for `load_model`.
        layer_by_layer: whether it runs so; None: on the CPU it does, and on an accelerator if its weights, as they are
            computed with, take more than half of the free memory.

    Raises:
        CameraError: as `load_model`.
    """
    if isinstance(model, TextModel):
        return model
    if not isinstance(model, (str, Path)):
        return _Whole(model)
    path, place = Path(model), resolve_device(device)
    packed = path.is_file() or (path / SUMMARY_NAME).is_file()
    checkpoint = PackedCheckpoint.open(path) if packed else Checkpoint.open(path)
    as_dtype = resolve_dtype(dtype, checkpoint.dtype)
    if layer_by_layer is None:
        layer_by_layer = place.type == "cpu" or not fits(checkpoint, place, as_dtype)
    if layer_by_layer:
        return _LayerByLayer(checkpoint, place, as_dtype)
    return _Whole(load_model(path, dtype, device))


def fits(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether an accelerator has room for all weights."""
    weights = sum(prod(tensor.shape) for tensor in checkpoint.needed.values()) * dtype.itemsize
    return weights <= WHOLE_SHARE * free_memory_bytes(device)


def hidden_states(model: "PreTrainedModel", batch_BT: torch.Tensor) -> torch.Tensor:
    """What the output head reads, [B, T, H], of sequences that are padded on the right if at all."""
    decoder = model.get_decoder()
    hidden_BTH: torch.Tensor = decoder(input_ids=batch_BT.to(model.device), use_cache=False).last_hidden_state
    return hidden_BTH


class _Whole(TextModel):
    def __init__(self, model: "PreTrainedModel") -> None:
        self._model = model
        self._head: nn.Module = model.get_output_embeddings()
        self._config = model.config.to_dict()
        family = FAMILIES.get(model.config.model_type)
        self._scales = family.scales if family is not None else Scales()
        self.dtype, self.device = model.dtype, model.device
        self.vocabulary = int(model.config.vocab_size)
        self.positions = int(model.config.max_position_embeddings)
        self.token_bytes = int(model.config.hidden_size) * self.dtype.itemsize
        # Another layer, that computes with blocks, cannot be cut.
        plain = type(self._head) is nn.Linear
        self.slice_rows = (
            slice_rows(self.device, self.vocabulary, self.token_bytes) if plain else self.vocabulary
        )

    def hidden(self, windows_WT: torch.Tensor, batch_size: int, advance: Advance) -> torch.Tensor:
        return torch.cat([hidden_states(self._model, batch_BT) for batch_BT in windows_WT.split(batch_size)])

    def head(self, first: int, stop: int) -> Logits:
        if stop - first == self.vocabulary:
            return finished(self._head, self._scales, self._config)
        whole = self._head
        assert isinstance(whole, nn.Linear)
        bias = None if whole.bias is None else whole.bias[first:stop]
        part = partial(F.linear, weight=whole.weight[first:stop], bias=bias)
        return finished(part, self._scales, self._config)

    def states(self, windows_WT: torch.Tensor) -> Iterator[torch.Tensor]:
        # The first is the embedding; the last has passed the final norm, which leaves NaN and infinity in place.
        ids_WT, decoder = windows_WT.to(self.device), self._model.get_decoder()
        yield from decoder(input_ids=ids_WT, use_cache=False, output_hidden_states=True).hidden_states[1:]


class _LayerByLayer(TextModel):
    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self._checkpoint = checkpoint
        self._runner = LayerRunner(checkpoint, device, dtype)
        self._norm = final_norm(checkpoint, device, dtype)
        self.dtype, self.device, self.layers = dtype, device, checkpoint.layer_count
        self._sparse = any(checkpoint.is_sparse(layer) for layer in range(self.layers))
        self.vocabulary = checkpoint.tensors[checkpoint.embedding].shape[0]
        self.positions = int(checkpoint.hf_config.max_position_embeddings)
        row_bytes = checkpoint.hidden_size * dtype.itemsize
        self.token_bytes = (SPARSE_COPIES if self._sparse else 1) * row_bytes
        self.slice_rows = slice_rows(device, self.vocabulary, row_bytes)

    def hidden(self, windows_WT: torch.Tensor, batch_size: int, advance: Advance) -> torch.Tensor:
        if self.device.type == "cpu":
            # Gate, up and their product.
            window_bytes = 3 * windows_WT.shape[1] * self._checkpoint.ffn_width * self.dtype.itemsize
            batch_size = max(1, min(batch_size, ACTIVATION_BYTES // window_bytes))
        *_, hidden_WTH = self._run(windows_WT, batch_size, advance)
        for batch_BTH in hidden_WTH.split(batch_size):
            batch_BTH.copy_(self._norm(batch_BTH.to(self.device)))
        return hidden_WTH

    def head(self, first: int, stop: int) -> Logits:
        name = self._checkpoint.head
        weight_SH = self._checkpoint.read_rows(name, torch.arange(first, stop))
        if not all(map(torch.isfinite, weight_SH.aminmax())):
            raise CameraError(f"{self._checkpoint.folder}: {name} holds NaN or infinity; it is damaged")
        head = partial(F.linear, weight=weight_SH.to(self.device, self.dtype))
        return finished(head, self._checkpoint.family.scales, self._checkpoint.config)

    def states(self, windows_WT: torch.Tensor) -> Iterator[torch.Tensor]:
        return self._run(windows_WT, len(windows_WT), lambda windows: None)

    def _run(self, windows_WT: torch.Tensor, batch_size: int, advance: Advance) -> Iterator[torch.Tensor]:
        """The hidden states on the CPU after each layer, which are overwritten by the next."""
        call = self._runner.caller(windows_WT.shape[1])
        hidden_WTH = self._runner.embed(windows_WT)
        buffers = Buffers(hidden_WTH, lambda: torch.empty_like(hidden_WTH)) if self._sparse else None
        samples = Samples(
            hidden_WTH,
            batch_size,
            [False] * len(hidden_WTH),
            tell=lambda seen: advance((seen - 1) % batch_size + 1),  # the size of the last batch
        )
        for layer in range(self.layers):
            with self._runner.layer(layer) as module:
                if buffers is not None and self._runner.checkpoint.is_sparse(layer):
                    # Not batch by batch: each expert is read once for all its tokens.
                    run = ExpertsPass(self._runner, layer, module, call, samples, buffers)
                    for block in run.blocks:
                        run.put_out(block, None, {})
                    run.finish()
                else:
                    for batch_BTH in hidden_WTH.split(batch_size):
                        batch_BTH.copy_(call(module, batch_BTH.to(self.device)))
                        advance(len(batch_BTH))
            yield hidden_WTH
