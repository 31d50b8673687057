"""Models run by torch in this process: 16-bit from a checkpoint folder, 4-bit from blocks."""

import gc
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from camera.devices import (
    dtype_name,
    find_device,
    memory_bytes,
    peak_memory_bytes,
    release_memory,
    reset_peak_memory,
    synchronize,
    use_device,
)
from camera.engines import ENGINES, Engine, Footprint, Timing
from camera.engines.parts.int4_choice import KERNELS
from camera.engines.parts.int4_linear import INT4_TYPES
from camera.errors import CameraError
from camera.loading import Source, assemble, open_source
from camera.models import Family
from camera.models.experts import Config
from camera.options import BenchmarkOptions
from camera.versions import installed

if TYPE_CHECKING:
    from camera.engines.parts.step import DecodeStep


class TorchEngine(Engine):
    """Batch 1, greedy, one token at a time.

    On an accelerator a token is a step of fixed shapes, fused or compiled where that is faster, and replayed as a graph; on
    the CPU it is transformers' forward over what the context has filled.

    From a GGUF or a quantised folder, linear layers whose weights are Q4_0 or Q4_0_64 stay 4-bit where the device has a
    kernel for their shape, and so does the embedding (see `DecodingLayers`); everything else, experts too, is in 16 bits.
    """

    in_torch = True
    settings = (
        *("CPU_AFFINITY_CONF", "NVIDIA_TF32_OVERRIDE", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"),
        *("PYTORCH_NPU_ALLOC_CONF", "TASK_QUEUE_ENABLE"),
    )

    def __init__(
        self, path: Path | Source, device: torch.device, capacity: int, *, plain: bool = False
    ) -> None:
        """Load a model.

        Args:
            path: a checkpoint folder, a quantised folder, or a GGUF file; or what one of them is read from.
            device: from `camera.devices.resolve_device`.
            capacity: most tokens, prompt and decoded together; at most the model's positions.
            plain: decode with transformers' forward as it is, for comparison: no layers joined, no fixed steps.

        Raises:
            CameraError: if the model cannot be read.
        """
        # Brings all of transformers, three seconds that a run which loads no model does not need.
        from camera.engines.parts.attention import GrowingCache, use_packed_attention
        from camera.engines.parts.linears import DecodingLayers

        use_device(device)
        source = path if isinstance(path, Source) else open_source(path)
        self.path, self.device, self.family = source.path, device, source.family
        self._weight_files = source.weight_files
        self.positions = int(source.config.max_position_embeddings)
        self.dtype = _dtype(source, device)
        self._layers = DecodingLayers(source, device, join=not plain)
        self.model = assemble(source, self.dtype, device, self._layers)
        self._experts_in_16_bits = _experts_in_16_bits(source)
        if self.family.attention == "sdpa":
            use_packed_attention(self.model)
        self.model.get_output_embeddings().register_forward_pre_hook(_with_usual_strides)
        self.cache = GrowingCache(self.model.config, min(capacity, self.positions))
        self._next_11 = torch.zeros((1, 1), dtype=torch.int64, device=device)
        self._growth: int | None = None
        self.step: DecodeStep | None = None
        # On the CPU a graph would save nothing, and what attention sees too much costs time.
        if device.type != "cpu" and not plain:
            self.step = self.fixed_step()
            self.step.prepare()

    @torch.inference_mode()
    def fixed_step(self) -> "DecodeStep":
        """Decoding in steps of fixed shapes; it binds the model to itself."""
        from camera.engines.parts.fused import fuse
        from camera.engines.parts.step import DecodeStep

        self.prefill([0])
        prefixes = map(self.family.layer_prefix, range(self.model.config.num_hidden_layers))
        layers = [self.model.get_submodule(prefix[:-1]) for prefix in prefixes]
        fused = fuse(self.model, self.family, layers, self.cache)
        return DecodeStep(self.model, layers, self.cache, self.device, fused)

    @classmethod
    def load(cls, path: Path, options: BenchmarkOptions, device: torch.device) -> Self:
        return cls(path, device, options.prompt + max(options.decode))

    @classmethod
    def build(cls, options: BenchmarkOptions) -> str:
        return torch.__version__

    @classmethod
    def identity(cls, options: BenchmarkOptions) -> dict[str, Any]:
        on_npu = find_device(options.device).type == "npu"
        backend = {"torch_npu": installed("torch-npu")} if on_npu else {}
        return {**super().identity(options), "torch": torch.__version__, **backend}

    @torch.inference_mode()
    def prefill(self, tokens: Sequence[int]) -> torch.Tensor:
        """Forget the context, then compute a prompt; returns the logits of its last token, [vocabulary]."""
        self.cache.clear()
        tokens_1T = torch.tensor([list(tokens)], dtype=torch.int64, device=self.device)
        logits_V = self._forward(tokens_1T)[0, -1]
        if self.step is not None:
            self.step.begin(self._next_11, len(tokens))
        return logits_V

    @torch.inference_mode()
    def decode(self, count: int) -> torch.Tensor:
        """Go on greedily from wherever the context ends; returns the tokens chosen, int64 [count].

        End-of-text tokens are tokens like any other here: a benchmark decodes as many as it was asked to.
        """
        if self.step is not None:
            return self.step.decode(count)
        chosen = []
        for _ in range(count):
            chosen.append(self._next_11)
            self._forward(self._next_11)
        return torch.cat(chosen, dim=1)[0]

    def _forward(self, tokens_1T: torch.Tensor) -> torch.Tensor:
        logits_11V: torch.Tensor = self.model(
            input_ids=tokens_1T, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        ).logits
        self._next_11 = logits_11V.argmax(dim=-1)
        return logits_11V

    def time_once(self, prompt: int, decode: Sequence[int]) -> Timing:
        tokens = [7919 * index % int(self.model.config.vocab_size) for index in range(1, prompt + 1)]
        marks = sorted(set(decode))
        decode_s = {}
        can_reset, before = reset_peak_memory(self.device), memory_bytes(self.device)
        gc.disable()  # a collection in the middle of a run would be timed as the model's
        try:
            synchronize(self.device)
            start = perf_counter()
            logits = self.prefill(tokens)
            synchronize(self.device)
            prefilled = perf_counter()
            for done, mark in zip([0, *marks], marks, strict=False):
                self.decode(mark - done)
                synchronize(self.device)
                decode_s[mark] = perf_counter() - prefilled
        finally:
            gc.enable()
        if not bool(torch.isfinite(logits).all()):
            raise CameraError(
                f"{self.path}: the logits of the prompt are not finite in {dtype_name(self.dtype)} on {self.device}; "
                "the model is damaged or overflows, and its speed says nothing"
            )
        if can_reset:
            self._growth = max(0, peak_memory_bytes(self.device) - before)
        return Timing(prefilled - start, decode_s)

    def footprint(self) -> Footprint:
        tensors = _tensors(self.model)
        weights = sum(tensor.nbytes for tensor in tensors.values())
        held = weights + self.cache.nbytes
        embedding, head = map(
            _tensors, (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        )
        looked_up = sum(tensor.nbytes for key, tensor in embedding.items() if key not in head)
        return Footprint(
            model_bytes=sum(file.stat().st_size for file in self._weight_files),
            held_bytes=held,
            peak_bytes=None if self._growth is None else held + self._growth,
            weight_bytes_per_token=weights - looked_up - self._unused_bytes(),
            kv_bytes_per_position=self.cache.nbytes // self.cache.growing[0].capacity,
        )

    def _unused_bytes(self) -> int:
        """Of the experts that a token is not routed to."""
        config, experts = self.model.config.to_dict(), self.family.experts
        parameters = set(_fused_experts(self.family, config).values())
        sizes = (self.model.get_parameter(name).nbytes for name in parameters)
        return 0 if experts is None else sum(size - experts.used(config, size) for size in sizes)

    def describe(self) -> dict[str, Any]:
        return {
            "torch": torch.__version__,
            "dtype": dtype_name(self.dtype),
            "attention": self.model.config._attn_implementation,
            "step": "grows with the context" if self.step is None else self.step.describe(),
            "linears": dict(self._layers.linears),
            "kernel trials, µs": self._layers.kernels.microseconds,
            "kernels not tried": self._layers.kernels.untried,
            "dequantised": dict(self._layers.fallbacks + self._experts_in_16_bits),
        }

    def close(self) -> None:
        del self.model, self.cache, self._next_11, self.step
        gc.collect()
        release_memory(self.device)


def _with_usual_strides(head: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
    """The head reads the last token, cut from a prompt; by its strides torch takes it for a batch and, on the CPU, copies
    the head's whole matrix to multiply with it."""
    (x,) = inputs
    return x.reshape(-1).view(x.shape)


def _tensors(module: nn.Module) -> dict[int, torch.Tensor]:
    """All parameters and buffers, by identity."""
    return {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}


def _fused_experts(family: Family, config: Config) -> dict[str, str]:
    """The parameter that holds a matrix of an expert, by the matrix's name."""
    layers = (family.fused(config, layer) for layer in range(int(config["num_hidden_layers"])))
    return {name: place.parameter for layer in layers for name, place in layer.items()}


def _experts_in_16_bits(source: Source) -> Counter[str]:
    """How many experts' matrices are stored in 4 bits and computed in 16, by the reason."""
    if source.packed is None:
        return Counter()
    types = (source.packed(name)[0] for name in _fused_experts(source.family, source.config.to_dict()))
    return Counter(f"{type}: experts" for type in types if type in INT4_TYPES)


def _dtype(source: Source, device: torch.device) -> torch.dtype:
    """The checkpoint's own, or where matrices are blocks, the one that the device's 4-bit kernel computes in."""
    if source.packed is not None:
        types = {source.packed(name)[0] for name in source.names}
        if types - {"f32", "f16", "bf16"}:
            return KERNELS[device.type][0].dtype
    return source.dtype


ENGINES.register("torch", TorchEngine)
