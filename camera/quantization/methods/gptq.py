"""GPTQ: the layers rounded one after the other, each matrix for what the stored ones before it put out.

The rounding itself is `camera.quantization.compensated_q4`.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import nn

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.rows import Rows
from camera.checkpoints.safetensors_file import read_tensors
from camera.devices import exact_device, resolve_dtype
from camera.formats import blocks
from camera.formats.blocks import Put
from camera.formats.quantized_model import layer_file, packed_shape
from camera.layerwise.experts import Matrices, activations
from camera.layerwise.experts_pass import ExpertsPass
from camera.layerwise.observers import final_norm, input_products, sum_of_products
from camera.layerwise.runner import LayerRunner
from camera.models import Block
from camera.models.block import FEED_FORWARD
from camera.options import QuantizeOptions
from camera.quantization.compensated_q4 import put_into, store_by_gptq
from camera.quantization.factor import Factor, factor_moments
from camera.quantization.hidden_states import HiddenStates
from camera.quantization.method import Calibration, Method, Stored
from camera.quantization.methods.search import store_by_search
from camera.quantization.plan import PlannedTensor, plan_types
from camera.quantization.q4 import is_q4
from camera.registry import QUANTIZATION_METHODS

LEAST_TOKENS = 16
"""An expert that fewer calibration tokens come to is searched with equal weights: of so few, nothing can be learnt."""


class Gptq(Method):
    """Error-compensated rounding, layer by layer: each linear layer's moments are of what the quantised ones before
    it put out, within a decoder layer too; an expert's are of the tokens that the router sends it.

    An embedding that multiplies nothing is searched with equal weights. One that is also the output head is rounded
    for what it does there, by moments that one more pass through the original model gathers first. Layers of
    shards that an earlier run finished are read back and only passed through.
    """

    inverts_moments = True
    uses = frozenset({"damping"})

    def __init__(
        self, checkpoint: Checkpoint, options: QuantizeOptions, out: Path, calibration: Calibration
    ) -> None:
        """See `Method`."""
        super().__init__(checkpoint, options, out, calibration)
        self._tokens_ST = calibration.tokens
        self._planned = {planned.name: planned for planned in plan_types(checkpoint, options)}
        self._next = 0
        self._ready: dict[str, tuple[np.ndarray, Stored]] = {}

    def store(self, tensor: PlannedTensor, rows: Rows, put: Put, name: str) -> Stored:
        if not is_q4(tensor.type):
            return self.round_to_nearest(tensor, rows, put, name)
        if tensor.name == self.checkpoint.embedding:
            return self._store_embedding(tensor, rows, put, name)
        layer = self.checkpoint.family.layer_of(tensor.name)
        with torch.inference_mode():
            if layer is None:
                self._pass_until(self.checkpoint.layer_count)
                factor_HH = self._factor(self._head_products(self._states), name)
                return _compensated(tensor, rows, put, name, factor_HH)
            self._pass_until(layer)
            if self._next == layer:
                self._quantize_layer()
        data, stored = self._ready.pop(tensor.name)
        put(0, data)
        return stored

    def _store_embedding(self, tensor: PlannedTensor, rows: Rows, put: Put, name: str) -> Stored:
        if not is_q4(tensor.type):
            return self.round_to_nearest(tensor, rows, put, name)
        if not self.checkpoint.tied:
            return store_by_search(rows, tensor.type, put, name=name)
        with torch.inference_mode():
            return _compensated(tensor, rows, put, name, self._tied_factor)

    @cached_property
    def _runner(self) -> LayerRunner:
        dtype = resolve_dtype(self.options.dtype, self.checkpoint.dtype)
        return LayerRunner(self.checkpoint, self.device, dtype)

    @cached_property
    def _states(self) -> HiddenStates:
        """What enters layer `_next`."""
        self._runner.embed(self._tokens_ST)  # refuses tokens that have no row, and damaged rows
        rows, inverse_ST = torch.unique(self._tokens_ST, return_inverse=True)
        planned = self._planned[self.checkpoint.embedding]
        used = self.checkpoint.read(planned.name)[rows]
        data = _room(planned.type, used.shape)
        self._store_embedding(planned, used, put_into(data), self._label(planned.name))
        hidden_STH = self._runner.entering(_numbers(data, planned.type, used.shape))[inverse_ST]
        return HiddenStates(self._runner, hidden_STH, self.options.batch_size)

    def _pass_until(self, layer: int) -> None:
        """Bring the hidden states to a layer, through those before it as their finished shards store them."""
        states = self._states  # before a layer is taken: it may run all layers itself
        if self._next < layer:
            self.settle()
        while self._next < layer:
            shard = read_tensors(self.out / layer_file(self._next))
            prefix = self.checkpoint.family.layer_prefix(self._next)
            with self._runner.layer(self._next) as module:
                for linear in chain.from_iterable(states.linears(self._next)):
                    name = f"{prefix}{linear}.weight"
                    _set(module, linear, self._stored(name, shard[name].numpy()))
                if self.checkpoint.is_sparse(self._next):
                    run = states.experts(self._next, module)
                    for block in run.blocks:
                        stored = {name: self._stored(name, shard[name].numpy()) for name in block.names}
                        _put_out(run, block, stored)
                    run.finish()
                else:
                    states.advance(module)
            self._next += 1

    def _quantize_layer(self) -> None:
        """Pack the matrices of layer `_next`, and bring the hidden states past it."""
        states = self._states  # before the layer is taken: it may run all layers itself
        prefix = self.checkpoint.family.layer_prefix(self._next)
        with self._runner.layer(self._next) as module:
            for group in states.linears(self._next):
                gather = _gathering(states, module, group[0], self.device)
                stored = self._quantized([f"{prefix}{linear}.weight" for linear in group], gather)
                for linear, weight in zip(group, stored.values(), strict=True):
                    _set(module, linear, weight)
            if self.checkpoint.is_sparse(self._next):
                run = states.experts(self._next, module)
                for block in run.blocks:
                    self._quantize_block(run, block)
                run.finish()
            else:
                states.advance(module)
        self._next += 1

    def _quantize_block(self, run: ExpertsPass, block: Block) -> None:
        """Pack the matrices of an expert, or of the network that they share, and let it put out what is stored."""
        tokens = sum(map(len, run.inputs(block)))
        enough = block.expert is None or tokens >= LEAST_TOKENS

        def gather_inputs() -> torch.Tensor:
            return sum_of_products(run.inputs(block), self.checkpoint.hidden_size, self.device)

        def gather_activations() -> torch.Tensor:
            inner = Matrices(stored[block.gate], stored[block.up], stored[block.up].T)
            acts = (activations(hidden_NH, inner, run.act) for hidden_NH in run.inputs(block))
            return sum_of_products(acts, block.width(self.checkpoint.config), self.device)

        few = None if enough else tokens
        stored = self._quantized([block.gate, block.up], gather_inputs, few)
        stored |= self._quantized([block.down], gather_activations, few)
        _put_out(run, block, stored)

    def _quantized(
        self, names: list[str], gather: Callable[[], torch.Tensor], few_tokens: int | None = None
    ) -> dict[str, torch.Tensor]:
        """Pack matrices that share an input.

        Args:
            names: of the matrices.
            gather: gives the second moments of the input.
            few_tokens: so many tokens came, and that is too few; None if they will do.

        Returns:
            their numbers as stored, on the device, by name.
        """
        data = {name: _room(self._planned[name].type, self._planned[name].shape) for name in names}
        stored: dict[str, torch.Tensor] = {}
        compensated: dict[str, dict[str, Rows]] = {}
        for name in names:
            tensor, rows, put = self._planned[name], self.checkpoint.rows(name), put_into(data[name])
            if not is_q4(tensor.type):
                self.round_to_nearest(tensor, rows, put, self._label(name))
            elif few_tokens is None:
                compensated.setdefault(tensor.type, {})[name] = rows
                continue
            else:
                lost = store_by_search(rows, tensor.type, put, name=self._label(name))
                self._ready[name] = data[name], replace(lost, few_tokens=few_tokens)
            stored[name] = self._stored(name, data[name])
        factor = self._factor(gather(), self._label(names[0])) if compensated else None
        for type, matrices in compensated.items():
            assert factor is not None
            puts = {self._label(name): put_into(data[name]) for name in matrices}
            labelled = dict(zip(puts, matrices.values(), strict=True))
            found = store_by_gptq(labelled, type, puts, factor, self._runner.dtype)
            for name, rounded in zip(matrices, found.values(), strict=True):
                assert rounded.numbers is not None
                stored[name] = rounded.numbers
                self._ready[name] = data[name], rounded.lost
        return {name: stored[name] for name in names}

    def _label(self, name: str) -> str:
        """What to call a tensor in messages."""
        return f"{self.checkpoint.folder}: {name}"

    def _factor(self, moments_II: torch.Tensor, name: str) -> Factor:
        exact_II = moments_II.to(exact_device(self.device), torch.float64)
        factor = factor_moments(exact_II, self.options.damping, name=name)
        return Factor(*(part.to(self.device) for part in factor))

    @cached_property
    def _tied_factor(self) -> Factor:
        """Of the moments of the output head's inputs in the original model."""
        states = HiddenStates(self._runner, self._runner.embed(self._tokens_ST), self.options.batch_size)
        for layer in range(self.checkpoint.layer_count):
            with self._runner.layer(layer) as module:
                states.advance(module)
        return self._factor(self._head_products(states), self._label(self.checkpoint.embedding))

    def _head_products(self, states: HiddenStates) -> torch.Tensor:
        norm = final_norm(self.checkpoint, self.device, self._runner.dtype)
        head = nn.Sequential(norm, nn.Linear(self.checkpoint.hidden_size, 1, bias=False, device="meta"))
        return input_products(head, lambda module, batch: module(batch), states.batches_BTH, "1", self.device)

    def _stored(self, name: str, data: np.ndarray) -> torch.Tensor:
        """The numbers that a matrix is stored as, on the device."""
        tensor = self._planned[name]
        return _numbers(data, tensor.type, tensor.shape).to(self.device, self._runner.dtype)


def _compensated(tensor: PlannedTensor, rows: Rows, put: Put, name: str, factor: Factor) -> Stored:
    """Store a matrix that no layer computes with afterwards."""
    return store_by_gptq({name: rows}, tensor.type, {name: put}, factor)[name].lost


def _room(type: str, shape: tuple[int, ...]) -> np.ndarray:
    """Memory for the bytes of a matrix."""
    return np.empty(packed_shape(type, shape), np.uint8)


def _gathering(
    states: HiddenStates, module: nn.Module, linear: str, device: torch.device
) -> Callable[[], torch.Tensor]:
    return lambda: input_products(module, states.call, states.batches_BTH, linear, device)


def _put_out(run: ExpertsPass, block: Block, stored: dict[str, torch.Tensor]) -> None:
    """Let a block put out what its stored matrices make, all channels taking part."""
    by_role = {role: stored[block.by_role[role]] for role in FEED_FORWARD}
    run.put_out(block, torch.arange(len(by_role["gate"])), by_role)


def _set(module: nn.Module, linear: str, weight: torch.Tensor) -> None:
    """Let a linear layer compute with the numbers that are stored."""
    module.get_submodule(linear).weight = nn.Parameter(weight, requires_grad=False)


def _numbers(data: np.ndarray, type: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(blocks.dequantize(data, type, shape[-1])).reshape(shape)


QUANTIZATION_METHODS.register("gptq", Gptq)
