"""A causal model as measurements on text see it: final hidden states and an output head.

The model is whole in memory, or its decoder layers run one after the other, each with its weights read just before.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from camera.checkpoints.checkpoint import Checkpoint
from camera.devices import free_memory_bytes, resolve_device, resolve_dtype
from camera.errors import CameraError
from camera.evaluation.packed_checkpoint import PackedCheckpoint
from camera.formats.quantized_model import SUMMARY_NAME
from camera.layerwise.experts_pass import Buffers, ExpertsPass
from camera.layerwise.feed_forward import Samples
from camera.layerwise.observers import final_norm
from camera.layerwise.runner import LayerRunner
from camera.loading import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WHOLE_SHARE = 0.5
"""A checkpoint that takes more of the device's free memory runs layer by layer."""
HIDDEN_SHARE = 0.25
"""Of the host's free memory: what the hidden states of the windows may take that go through the layers at once."""
_SPARSE_COPIES = 3
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
    layers: int = 0
    """How often `hidden` tells that a window has passed a layer."""
    head: Callable[[torch.Tensor], torch.Tensor]
    """From hidden states [N, H] on the device to logits [N, V]."""

    @abstractmethod
    def hidden(self, windows_WT: torch.Tensor, batch_size: int, advance: Advance) -> Iterator[torch.Tensor]:
        """What the output head reads, [B, T, H] on the device, for one batch of windows after the other."""

    @abstractmethod
    def states(self, windows_WT: torch.Tensor) -> Iterator[torch.Tensor]:
        """The hidden states [W, T, H] after each decoder layer."""


def open_text_model(
    model: "TextModel | PreTrainedModel | Path | str", dtype: str, device: str, layer_by_layer: bool | None
) -> TextModel:
    """Open what is measured.

    Args:
        model: what `camera.loading.load_model` opens; or a model that is open already, which stays as it is.
        dtype, device: as for `load_model`.
        layer_by_layer: how a checkpoint or a quantised folder runs; None: layer by layer if its weights, as they are
            computed with, take more than half of the device's free memory. A GGUF always runs whole.

    Raises:
        CameraError: as `load_model`; if a GGUF is to run layer by layer.
    """
    if isinstance(model, TextModel):
        return model
    if not isinstance(model, (str, Path)):
        return _Whole(model)
    path = Path(model)
    if path.is_dir():
        packed = (path / SUMMARY_NAME).is_file()
        checkpoint = PackedCheckpoint.open(path) if packed else Checkpoint.open(path)
        place = resolve_device(device)
        own = getattr(checkpoint.hf_config, "dtype", None) or torch.float32 if packed else checkpoint.dtype
        as_dtype = resolve_dtype(dtype, own)
        if layer_by_layer is None:
            weights = sum(prod(tensor.shape) for tensor in checkpoint.needed.values()) * as_dtype.itemsize
            layer_by_layer = weights > WHOLE_SHARE * free_memory_bytes(place)
        if layer_by_layer:
            return _LayerByLayer(checkpoint, place, as_dtype)
    elif layer_by_layer:
        raise CameraError(f"{path}: a GGUF file does not run layer by layer: leave layer_by_layer out")
    return _Whole(load_model(path, dtype, device))


def hidden_states(model: "PreTrainedModel", batch_BT: torch.Tensor) -> torch.Tensor:
    """What the output head reads, [B, T, H], of sequences that are padded on the right if at all."""
    decoder = model.get_decoder()
    hidden_BTH: torch.Tensor = decoder(input_ids=batch_BT.to(model.device), use_cache=False).last_hidden_state
    return hidden_BTH


class _Whole(TextModel):
    def __init__(self, model: "PreTrainedModel") -> None:
        self._model = model
        self.dtype, self.device = model.dtype, model.device
        self.vocabulary = model.get_input_embeddings().get_parameter("weight").shape[0]
        self.positions = int(model.config.max_position_embeddings)
        self.head = model.get_output_embeddings()

    def hidden(self, windows_WT: torch.Tensor, batch_size: int, advance: Advance) -> Iterator[torch.Tensor]:
        return (hidden_states(self._model, batch_BT) for batch_BT in windows_WT.split(batch_size))

    def states(self, windows_WT: torch.Tensor) -> Iterator[torch.Tensor]:
        # The first is the embedding; the last has passed the final norm, which leaves NaN and infinity in place.
        ids_WT, decoder = windows_WT.to(self.device), self._model.get_decoder()
        yield from decoder(input_ids=ids_WT, use_cache=False, output_hidden_states=True).hidden_states[1:]


class _LayerByLayer(TextModel):
    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self._runner = LayerRunner(checkpoint, device, dtype)
        self._norm = final_norm(checkpoint, device, dtype)
        self.dtype, self.device, self.layers = dtype, device, checkpoint.layer_count
        self._sparse = any(checkpoint.is_sparse(layer) for layer in range(self.layers))
        self.vocabulary = checkpoint.tensors[checkpoint.embedding].shape[0]
        self.positions = int(checkpoint.hf_config.max_position_embeddings)
        self.head = partial(F.linear, weight=checkpoint.read_finite(checkpoint.head).to(device, dtype))

    def hidden(self, windows_WT: torch.Tensor, batch_size: int, advance: Advance) -> Iterator[torch.Tensor]:
        copies = _SPARSE_COPIES if self._sparse else 1
        window_bytes = (
            copies * windows_WT.shape[1] * self._runner.checkpoint.hidden_size * self.dtype.itemsize
        )
        at_once = int(HIDDEN_SHARE * free_memory_bytes(torch.device("cpu")) / window_bytes)
        for part_WT in windows_WT.split(max(1, at_once // batch_size) * batch_size):
            *_, hidden_WTH = self._run(part_WT, batch_size, advance)
            for batch_BTH in hidden_WTH.split(batch_size):
                yield self._norm(batch_BTH.to(self.device))

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
