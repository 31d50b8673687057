"""Where the bytes of a calibrated quantisation come from: one packer for each method."""

from collections.abc import Callable
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from torch import nn

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import read_tensors
from camera.devices import resolve_device, resolve_dtype
from camera.formats import blocks
from camera.formats.quantize import Packed, PlannedTensor, layer_file, plan_types
from camera.layerwise.observers import SHARED_INPUTS, advance, final_norm, input_products
from camera.layerwise.runner import LayerRunner
from camera.options import BlockType, QuantizeOptions
from camera.quantization.errors import error_by_products, error_by_squares
from camera.quantization.gptq import inverse_factor, quantize_by_gptq
from camera.quantization.imatrix import Imatrix
from camera.quantization.q4 import is_q4
from camera.quantization.search import quantize_by_search


def digest_tokens(tokens_ST: torch.Tensor) -> str:
    """Hex sha256 of calibration tokens and their shape."""
    content = np.ascontiguousarray(tokens_ST.numpy(), "<i8")
    return sha256(f"{content.shape}".encode() + content.tobytes()).hexdigest()


class SearchPacker:
    """Scales searched by an importance matrix; matrices that it does not know are searched with equal weights."""

    def __init__(self, source: str, imatrix: Callable[[], Imatrix]) -> None:
        """Args:
        source: digest of what the importance matrix comes from.
        imatrix: gives it; called at most once, when a tensor needs it.
        """
        self.source: str | None = source
        self._gather = imatrix

    @cached_property
    def _imatrix(self) -> Imatrix:
        return self._gather()

    def pack(self, tensor: PlannedTensor, weight: torch.Tensor, name: str) -> Packed:
        if not is_q4(tensor.type):
            return Packed(blocks.quantize(weight, tensor.type, name=name))
        importance = self._imatrix.importance(tensor.name)
        data = quantize_by_search(weight, tensor.type, importance, name=name)
        if importance is None:
            return Packed(data)
        stored = _numbers(data, tensor.type, weight.shape)
        return Packed(data, error_by_squares(weight.float(), stored, importance))


class GptqPacker:
    """Error-compensated rounding, layer by layer: each linear layer's moments are of what the quantised ones before
    it put out, within a decoder layer too.

    An embedding that multiplies nothing is searched with equal weights. One that is also the output head is rounded
    for what it does there, by moments that one more walk through the original model gathers before all else. Layers of
    shards that an earlier run finished are read back and only passed through.
    """

    def __init__(
        self, checkpoint: Checkpoint, tokens_ST: torch.Tensor, options: QuantizeOptions, out: Path
    ) -> None:
        """Args:
        checkpoint: the source.
        tokens_ST: int64 [samples, tokens].
        options: types, damping, batch size, dtype and device.
        out: the folder in which the finished shards are.
        """
        self.source: str | None = digest_tokens(tokens_ST)
        self._checkpoint = checkpoint
        self._tokens_ST = tokens_ST
        self._options = options
        self._out = out
        self._planned = {planned.name: planned for planned in plan_types(checkpoint, options)}
        self._layer_of = {
            name: layer for layer in range(checkpoint.layer_count) for name in checkpoint.layer_tensors(layer)
        }
        self._device = resolve_device(options.device)
        self._next = 0
        self._ready: dict[str, Packed] = {}

    def pack(self, tensor: PlannedTensor, weight: torch.Tensor, name: str) -> Packed:
        if not is_q4(tensor.type):
            return Packed(blocks.quantize(weight, tensor.type, name=name))
        if tensor.name == self._checkpoint.embedding:
            return self._pack_embedding(tensor, weight, name)
        layer = self._layer_of.get(tensor.name)
        with torch.inference_mode():
            if layer is None:
                self._pass_until(self._checkpoint.layer_count)
                return self._compensate(tensor, weight, name, self._head_products(self._batches_BTH))
            self._pass_until(layer)
            if self._next == layer:
                self._quantize_layer()
        return self._ready.pop(tensor.name)

    def _pack_embedding(self, tensor: PlannedTensor, weight: torch.Tensor, name: str) -> Packed:
        if not is_q4(tensor.type):
            return Packed(blocks.quantize(weight, tensor.type, name=name))
        if not self._checkpoint.tied:
            return Packed(quantize_by_search(weight, tensor.type, name=name))
        with torch.inference_mode():
            return self._compensate(tensor, weight, name, self._tied_products)

    @cached_property
    def _walk(self) -> LayerRunner:
        return LayerRunner(
            self._checkpoint,
            self._device,
            resolve_dtype(self._options.dtype, self._checkpoint.dtype),
        )

    @cached_property
    def _call(self) -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
        return self._walk.caller(self._tokens_ST.shape[1])

    @cached_property
    def _batches_BTH(self) -> list[torch.Tensor]:
        """Hidden states that enter layer `_next`, on the CPU."""
        self._walk.embed(self._tokens_ST)  # refuses tokens that have no row, and damaged rows
        rows, inverse_ST = torch.unique(self._tokens_ST, return_inverse=True)
        planned = self._planned[self._checkpoint.embedding]
        used = self._checkpoint.read(planned.name)[rows]
        packed = self._pack_embedding(planned, used, f"{self._checkpoint.folder}: {planned.name}")
        stored = _numbers(packed.data, planned.type, used.shape).to(self._walk.dtype)
        return [stored[batch_BT] for batch_BT in inverse_ST.split(self._options.batch_size)]

    def _pass_until(self, layer: int) -> None:
        """Bring the hidden states to a layer, through those before it as their finished shards store them."""
        batches_BTH = self._batches_BTH  # before a layer is taken: it may need a walk of its own
        while self._next < layer:
            with self._walk.layer(self._next) as module:
                shard = read_tensors(self._out / layer_file(self._next))
                prefix = self._checkpoint.family.layer_prefix(self._next)
                for linear in (linear for group in SHARED_INPUTS for linear in group):
                    planned = self._planned[f"{prefix}{linear}.weight"]
                    self._set(
                        module, linear, _numbers(shard[planned.name].numpy(), planned.type, planned.shape)
                    )
                advance(module, self._call, batches_BTH, self._device)
            self._next += 1

    def _quantize_layer(self) -> None:
        """Pack the matrices of layer `_next`, and bring the hidden states past it."""
        batches_BTH = self._batches_BTH  # before the layer is taken: it may need a walk of its own
        prefix = self._checkpoint.family.layer_prefix(self._next)
        with self._walk.layer(self._next) as module:
            for group in SHARED_INPUTS:
                tensors = {linear: self._planned[f"{prefix}{linear}.weight"] for linear in group}
                moments_II = factor_II = None
                if any(is_q4(tensor.type) for tensor in tensors.values()):
                    moments_II = input_products(module, self._call, batches_BTH, group[0], self._device)
                    factor_II = inverse_factor(moments_II, self._options.damping, name=tensors[group[0]].name)
                for linear, tensor in tensors.items():
                    weight = self._checkpoint.read(tensor.name)
                    name = f"{self._checkpoint.folder}: {tensor.name}"
                    if is_q4(tensor.type) and moments_II is not None:
                        packed = self._compensate(tensor, weight, name, moments_II, factor_II)
                        self._ready[tensor.name] = packed
                    else:
                        packed = Packed(blocks.quantize(weight, tensor.type, name=name))
                    self._set(module, linear, _numbers(packed.data, tensor.type, tensor.shape))
            advance(module, self._call, batches_BTH, self._device)
        self._next += 1

    def _compensate(
        self,
        tensor: PlannedTensor,
        weight: torch.Tensor,
        name: str,
        moments_II: torch.Tensor,
        factor_II: torch.Tensor | None = None,
    ) -> Packed:
        if factor_II is None:
            factor_II = inverse_factor(moments_II, self._options.damping, name=name)
        data = quantize_by_gptq(weight, tensor.type, factor_II, moments_II.diagonal(), name=name)
        stored = _numbers(data, tensor.type, weight.shape)
        return Packed(data, error_by_products(weight.float(), stored, moments_II))

    @cached_property
    def _tied_products(self) -> torch.Tensor:
        """Moments of the output head's inputs in the original model."""
        batches_BTH = [
            self._walk.embed(batch_BT) for batch_BT in self._tokens_ST.split(self._options.batch_size)
        ]
        for layer in range(self._checkpoint.layer_count):
            with self._walk.layer(layer) as module:
                advance(module, self._call, batches_BTH, self._device)
        return self._head_products(batches_BTH)

    def _head_products(self, batches_BTH: list[torch.Tensor]) -> torch.Tensor:
        norm = final_norm(self._checkpoint, self._device, self._walk.dtype)
        head = nn.Sequential(norm, nn.Linear(self._checkpoint.hidden_size, 1, bias=False, device="meta"))
        return input_products(head, lambda module, batch: module(batch), batches_BTH, "1", self._device)

    def _set(self, module: nn.Module, linear: str, weight: torch.Tensor) -> None:
        parameter = nn.Parameter(weight.to(self._device, self._walk.dtype), requires_grad=False)
        module.get_submodule(linear).weight = parameter


def _numbers(data: np.ndarray, type: BlockType, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(blocks.dequantize(data, type, shape[-1])).reshape(shape)
