"""Running a checkpoint layer by layer.

The transformers model is built on the meta device, so its own layer classes compute and nothing is written
again per family; a layer's weights are read from the memory-mapped files just before use and dropped after.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import nn

from camera.checkpoints.checkpoint import Checkpoint
from camera.errors import CameraError
from camera.heap import SteadyHeap


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
        _refuse_windows(checkpoint)
        self._model = checkpoint.empty_model()
        rotary = type(self._model.get_submodule(checkpoint.family.rotary_module))
        self._rotary = rotary(checkpoint.hf_config).to(device)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        # An accelerator's allocator uses its blocks again as they are.
        self._heap = SteadyHeap() if device.type == "cpu" else None
        self._ahead: tuple[int, Future[dict[str, torch.Tensor]]] | None = None

    def embed(self, tokens_ST: torch.Tensor) -> torch.Tensor:
        """Hidden states [samples, tokens, hidden] that enter layer 0, on the CPU.

        Only the embedding rows in use are read.

        Raises:
            CameraError: for a token that has no row, and for rows with NaN or infinity.
        """
        name = self.checkpoint.embedding
        if name not in self.checkpoint.tensors:
            raise CameraError(f"{self.checkpoint.folder} has no tensor {name}")
        count = self.checkpoint.tensors[name].shape[0]
        rows, inverse = torch.unique(tokens_ST, return_inverse=True)
        outside = rows[(rows < 0) | (rows >= count)]
        if len(outside):
            raise CameraError(
                f"token {int(outside[-1])} is outside the embedding's {count} rows: "
                "the calibration tokens were made with another tokenizer"
            )
        used = self.checkpoint.read_rows(name, rows)
        if not torch.isfinite(used).all():
            raise CameraError(f"{self.checkpoint.folder}: {name} holds NaN or infinity")
        return used.to(self.dtype)[inverse]

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
            module.load_state_dict(weights, strict=True, assign=True)
        except RuntimeError as error:
            raise CameraError(
                f"{self.checkpoint.folder}: decoder layer {index} does not load: {error}"
            ) from None
        weights.clear()
        module.requires_grad_(False)
        try:
            yield module
        finally:
            module.to("meta")
            if self._heap is not None:
                self._heap.end_round()

    def _taken(self, index: int) -> dict[str, torch.Tensor]:
        """The weights of a layer on the device: those read ahead, or read now."""
        ahead, self._ahead = self._ahead, None
        return ahead[1].result() if ahead is not None and ahead[0] == index else self._load(index)

    def _read_ahead(self, index: int) -> None:
        """Read the next layer in a thread: to the accelerator, or on the CPU into the page cache, which is no
        memory of this process."""
        if self.device.type == "cpu":
            self._reader.submit(self.checkpoint.read_ahead, self.checkpoint.layer_tensors(index))
        else:
            self._ahead = (index, self._reader.submit(self._load, index))

    def _load(self, index: int) -> dict[str, torch.Tensor]:
        prefix = self.checkpoint.family.layer_prefix(index)
        return {
            name.removeprefix(prefix): self.checkpoint.read_finite(name).to(self.device, self.dtype)
            for name in self.checkpoint.layer_tensors(index)
        }

    def caller(self, length: int) -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
        """A function that runs a layer on hidden states [batch, length, hidden] with causal attention."""
        positions = torch.arange(length, device=self.device)[None]
        probe = torch.empty(1, length, 1, device=self.device, dtype=self.dtype)
        cos_sin = self._rotary(probe, positions)

        def call(module: nn.Module, hidden_BTH: torch.Tensor) -> torch.Tensor:
            # No mask: scaled-dot-product attention is causal when it is given none.
            out = module(hidden_BTH, position_embeddings=cos_sin, position_ids=positions, attention_mask=None)
            hidden: torch.Tensor = out[0] if isinstance(out, tuple) else out
            return hidden

        return call


def _refuse_windows(checkpoint: Checkpoint) -> None:
    """Sliding-window attention needs a mask per layer; none of the supported checkpoints uses it."""
    config = checkpoint.hf_config
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        raise CameraError(
            f"{checkpoint.folder}: layers of kind {', '.join(sorted(kinds))} are not supported; "
            "only full attention is (use_sliding_window: false)"
        )
