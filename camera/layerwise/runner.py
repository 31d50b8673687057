"""Running a checkpoint layer by layer.

The transformers model is built on the meta device, so its own layer classes compute and nothing is written
again per family; a layer's weights are read from the memory-mapped files just before use and dropped after.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import nn

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.names_in_model import dtype_in_model, names_in_model
from camera.checkpoints.weights import is_finite
from camera.devices import use_device
from camera.errors import CameraError
from camera.heap import SteadyHeap
from camera.layerwise.experts import (
    IMPLEMENTATION,
    Experts,
    Matrices,
    attach,
    detach,
    gather_rows,
    install,
)
from camera.layerwise.transfer import Transfer, Uploaded
from camera.models import Block

_EMBEDDED_BYTES = 16 << 20
"""About so much of the hidden states is embedded at once."""


class LayerRunner:
    """The decoder layers of one checkpoint, usable one after the other.

    Attributes:
        device: where layers compute.
        dtype: what layers compute in.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self.dtype = dtype
        install()
        self._model = checkpoint.empty_model(IMPLEMENTATION, dtype)
        self._rename = names_in_model(self._model)
        path = checkpoint.family.rotary_module
        rotary = type(self._model.get_submodule(path))
        self._model.set_submodule(path, rotary(checkpoint.hf_config).to(device))
        self._reader = ThreadPoolExecutor(
            1, thread_name_prefix="read-ahead", initializer=use_device, initargs=(device,)
        )
        # An accelerator's allocator uses its blocks again as they are.
        self._heap = SteadyHeap() if device.type == "cpu" else None
        self._ahead: tuple[int, Future[Uploaded]] | None = None
        self._unchecked: list[tuple[tuple[str, ...], torch.Tensor]] = []
        self._transfer = None if device.type == "cpu" else Transfer(device)

    def embed(self, tokens_ST: torch.Tensor, hidden_STH: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states [samples, tokens, hidden] that enter layer 0.

        Token by token in the order of their numbers, so that each row of the embedding is read once, no row that is not
        in use, and a few megabytes at a time.

        Args:
            tokens_ST: int64.
            hidden_STH: filled and given back, wherever it is; None for a new tensor on the CPU.

        Raises:
            CameraError: for a token that has no row, and for rows with NaN or infinity.
        """
        name = self.checkpoint.embedding
        if name not in self.checkpoint.tensors:
            raise CameraError(f"{self.checkpoint.folder} has no tensor {name}")
        count, width = self.checkpoint.tensors[name].shape
        tokens_N, place_N = tokens_ST.flatten().sort()
        outside = tokens_N[(tokens_N < 0) | (tokens_N >= count)]
        if len(outside):
            raise CameraError(
                f"token {int(outside[-1])} is outside the embedding's {count} rows: "
                "the calibration tokens were made with another tokenizer"
            )
        if hidden_STH is None:
            hidden_STH = torch.empty(*tokens_ST.shape, width, dtype=self.dtype)
        hidden_NH = hidden_STH.view(-1, width)
        device, at_once = hidden_NH.device, max(1, _EMBEDDED_BYTES // (width * self.dtype.itemsize))
        finite = torch.ones((), dtype=torch.bool, device=device)
        for part_N, to_N in zip(tokens_N.split(at_once), place_N.split(at_once), strict=True):
            rows_R, row_N = torch.unique_consecutive(part_N, return_inverse=True)
            used_RH = self.checkpoint.read_rows(name, rows_R).to(device)
            finite &= is_finite(used_RH)
            hidden_NH.index_copy_(0, to_N.to(device), gather_rows(self.entering(used_RH), row_N))
        if not finite:
            raise CameraError(f"{self.checkpoint.folder}: {name} holds NaN or infinity")
        return hidden_STH

    def entering(self, rows_RH: torch.Tensor) -> torch.Tensor:
        """Rows of the embedding as they enter layer 0."""
        rows_RH = rows_RH.to(self.dtype)
        scale = self.checkpoint.family.scales.embedding(self.checkpoint.config)
        return (
            rows_RH if scale == 1 else rows_RH * torch.tensor(scale, dtype=self.dtype, device=rows_RH.device)
        )

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """One decoder layer with its weights on the device; they are dropped when the block ends.

        Raises:
            CameraError: if a weight is missing, of the wrong shape, or holds NaN or infinity.
        """
        module = self._model.get_submodule(self.checkpoint.family.layer_prefix(index).removesuffix("."))
        weights = self._taken(index)
        if index + 1 < self.checkpoint.layer_count:
            self._read_ahead(index + 1)
        try:
            found = module.load_state_dict(weights, strict=False, assign=True)
            missing = [name for name in found.missing_keys if not self._is_expert(name, index)]
            if missing or found.unexpected_keys:
                raise RuntimeError(f"missing {missing}, unexpected {found.unexpected_keys}")
        except RuntimeError as error:
            raise CameraError(
                f"{self.checkpoint.folder}: decoder layer {index} does not load: {error}"
            ) from None
        weights.clear()
        module.requires_grad_(False)
        if self.checkpoint.is_sparse(index):
            attach(self.experts_module(module), self._experts(module, index))
        try:
            try:
                yield module
            finally:  # rather than that activations were not finite either
                self._check_experts()
        finally:
            module.to("meta")
            if self.checkpoint.is_sparse(index):
                detach(self.experts_module(module))
            if self._heap is not None:
                self._heap.end_round()

    def _taken(self, index: int) -> dict[str, torch.Tensor]:
        """The weights of a layer on the device, but its experts', by their names in the module: read ahead, or now."""
        if self._transfer is None:
            return {name: tensor.to(dtype) for name, tensor, dtype in self._weights(index, finite=True)}
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead[0] != index:
            ahead = (index, self._reader.submit(self._upload, index, self._transfer))
        return ahead[1].result().take()

    def _read_ahead(self, index: int) -> None:
        """Read the next layer in a thread: to the accelerator, or on the CPU into the page cache, which is no
        memory of this process."""
        if self._transfer is None:
            self._reader.submit(self.checkpoint.read_ahead, self._plain_tensors(index))
        else:
            self._ahead = (index, self._reader.submit(self._upload, index, self._transfer))

    def _upload(self, index: int, transfer: Transfer) -> Uploaded:
        uploaded = transfer.upload(self._weights(index, finite=False))
        if bad := transfer.names_not_finite(uploaded):
            prefix = self.checkpoint.family.layer_prefix(index)
            names = [name for name in self._plain_tensors(index) if self._rename(name) == prefix + bad[0]]
            raise self.checkpoint.not_finite(names[0])
        return uploaded

    def _weights(self, index: int, *, finite: bool) -> Iterator[tuple[str, torch.Tensor, torch.dtype]]:
        """Name in the module of each weight, itself as the file has it, and the dtype to compute in."""
        prefix = self.checkpoint.family.layer_prefix(index)
        built = self._model.get_submodule(prefix.removesuffix(".")).state_dict()
        for name in self._plain_tensors(index):
            inside = self._rename(name).removeprefix(prefix)
            dtype = built[inside].dtype if inside in built else self.dtype
            read = self.checkpoint.read_finite if finite else self.checkpoint.read
            yield inside, read(name), dtype_in_model(self._model, inside, dtype)

    def _plain_tensors(self, index: int) -> list[str]:
        experts = {
            name
            for block in self.checkpoint.blocks(index)
            if block.expert is not None
            for name in block.names
        }
        return [name for name in self.checkpoint.layer_tensors(index) if name not in experts]

    def matrices(self, block: Block) -> Matrices:
        """The matrices of a feed-forward network on the device.

        Raises:
            CameraError: if one is missing, of the wrong shape, or holds NaN or infinity.
        """
        width, hidden = block.width(self.checkpoint.config), self.checkpoint.hidden_size
        shapes = (width, hidden), (width, hidden), (hidden, width)
        found = map(self._matrix, block.names, shapes)
        if self.device.type == "cpu":
            return Matrices(*(matrix.to(self.dtype) for matrix in found))
        uploaded = self._direct.upload(
            (name, matrix, self.dtype) for name, matrix in zip(block.names, found, strict=True)
        )
        self._unchecked.append((block.names, uploaded.finite))
        return Matrices(*uploaded.take().values())

    def _matrix(self, name: str, shape: tuple[int, int]) -> torch.Tensor:
        on_cpu = self.device.type == "cpu"
        matrix = self.checkpoint.read_finite(name) if on_cpu else self.checkpoint.read(name)
        if matrix.shape != shape:
            raise CameraError(
                f"{self.checkpoint.folder}: {name} has shape {list(matrix.shape)} and config.json asks for {list(shape)}"
            )
        return matrix

    @cached_property
    def _direct(self) -> Transfer:
        """For this thread; the other is the reader's."""
        return Transfer(self.device)

    def _check_experts(self) -> None:
        """Refuse experts with NaN or infinity that an accelerator was given for this layer: read once."""
        unchecked, self._unchecked = self._unchecked, []
        if not unchecked:
            return
        names = [name for of_block, _ in unchecked for name in of_block]
        flags = torch.cat([finite for _, finite in unchecked]).cpu().tolist()
        for name, finite in zip(names, flags, strict=True):
            if not finite:
                raise self.checkpoint.not_finite(name)

    def sparse_module(self, layer: nn.Module) -> nn.Module:
        """Router, experts and what they share, of a decoder layer that routes its tokens."""
        experts = self.checkpoint.family.experts
        assert experts is not None
        return layer.get_submodule(experts.module)

    def experts_module(self, layer: nn.Module) -> nn.Module:
        """transformers' module of all experts; see `attached`."""
        return self.sparse_module(layer).get_submodule("experts")

    def _experts(self, layer: nn.Module, index: int) -> Experts:
        blocks = [block for block in self.checkpoint.blocks(index) if block.expert is not None]
        act = self.experts_module(layer).act_fn
        return Experts(lambda expert: self.matrices(blocks[expert]), act, len(blocks))  # type: ignore[arg-type]

    def _is_expert(self, name: str, index: int) -> bool:
        """Whether a weight of the module is one of transformers' for all experts."""
        if not self.checkpoint.is_sparse(index):
            return False
        experts = self.checkpoint.family.experts
        return experts is not None and name.startswith(f"{experts.module}.experts.")

    def caller(self, length: int) -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
        """A function that runs a layer on hidden states [batch, length, hidden] with causal attention.

        The layer's mask and positions are those that transformers' decoder hands it: in a family with sliding windows they
        differ from layer to layer.
        """
        given = self._given(length)

        def call(module: nn.Module, hidden_BTH: torch.Tensor) -> torch.Tensor:
            out = module(hidden_BTH, **given[module])
            hidden: torch.Tensor = out[0] if isinstance(out, tuple) else out
            return hidden

        return call

    def _given(self, length: int) -> dict[nn.Module, dict[str, Any]]:
        """What the decoder hands each of its layers beside the hidden states [1, length, hidden]."""
        family = self.checkpoint.family
        layers = [
            self._model.get_submodule(family.layer_prefix(index).removesuffix("."))
            for index in range(self.checkpoint.layer_count)
        ]
        norm = self._model.get_submodule(family.name("norm").removesuffix(".weight"))
        given: dict[nn.Module, dict[str, Any]] = {}

        def noting(layer: nn.Module) -> Callable[..., torch.Tensor]:
            def note(hidden_1TH: torch.Tensor, **arguments: Any) -> torch.Tensor:
                given[layer] = arguments
                return hidden_1TH

            return note

        for layer in layers:
            layer.forward = noting(layer)
        norm.forward = lambda hidden_1TH: hidden_1TH
        try:
            nothing = torch.zeros((), dtype=self.dtype, device=self.device)
            self._model.base_model(
                inputs_embeds=nothing.expand(1, length, self.checkpoint.hidden_size), use_cache=False
            )
        finally:
            for module in (*layers, norm):
                del module.forward
        return given
