"""Rounding in which later columns compensate the errors of earlier ones, into exactly the 4-bit block formats.

Source: Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, 2022,
section 3. Rounding weight j of a row changes the layer's output; the change is made as small as possible by moving the
weights that are still to be rounded, which the inverse of the inputs' second moments says how to do. Its upper
Cholesky factor U holds all that is needed: rounding w_j to q adds ((w_j − q) / U_jj)² to the loss. The columns go in
the format's order, so a block's scale can be chosen when its turn comes, for the weights as they have been moved:
several scales round the block, and of each row the one stays that added the least.
"""

from collections.abc import Callable
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import nn

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import read_tensors
from camera.devices import resolve_device, resolve_dtype
from camera.errors import CameraError
from camera.formats import blocks
from camera.formats.quantized_model import layer_file
from camera.layerwise.observers import advance, final_norm, input_products
from camera.layerwise.runner import LayerRunner
from camera.options import QuantizeOptions
from camera.quantization.method import Calibration, Method, Packed, rounded_to_nearest
from camera.quantization.methods.search import quantize_by_search
from camera.quantization.plan import PlannedTensor, plan_types
from camera.quantization.q4 import HIGHEST, LOWEST, error_by_products, is_q4, pack_rows
from camera.quantization.scales import scales_by_weightings
from camera.registry import BLOCK_FORMATS, QUANTIZATION_METHODS

_SHRINK = (1.0, 0.9, 0.8, 1.05, 0.95, 0.85, 0.75, 0.7, 0.6)
"""The grid of scales that is searched."""
_KEPT = 3
"""So many of them, from the first, also round the block one column after the other."""
_TINY = 1e-30
_CHUNK_ROWS = 512
"""Rows that a thread works on at once; they do not depend on each other. Fewer cost calls, more leave the cache."""
_MOST_DAMPING = 10.0


class Gptq(Method):
    """Error-compensated rounding, layer by layer: each linear layer's moments are of what the quantised ones before
    it put out, within a decoder layer too.

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
        self._layer_of = {
            name: layer for layer in range(checkpoint.layer_count) for name in checkpoint.layer_tensors(layer)
        }
        self._device = resolve_device(options.device)
        self._next = 0
        self._ready: dict[str, Packed] = {}

    def pack(self, tensor: PlannedTensor, weight: torch.Tensor, name: str) -> Packed:
        if tensor.name == self.checkpoint.embedding:
            return self._pack_embedding(tensor, weight, name)
        if not is_q4(tensor.type):
            return rounded_to_nearest(tensor, weight, name)
        layer = self._layer_of.get(tensor.name)
        with torch.inference_mode():
            if layer is None:
                self._pass_until(self.checkpoint.layer_count)
                return self._compensate(tensor, weight, name, self._head_products(self._batches_BTH))
            self._pass_until(layer)
            if self._next == layer:
                self._quantize_layer()
        return self._ready.pop(tensor.name)

    def _pack_embedding(self, tensor: PlannedTensor, weight: torch.Tensor, name: str) -> Packed:
        if not is_q4(tensor.type):
            return rounded_to_nearest(tensor, weight, name)
        if not self.checkpoint.tied:
            return Packed(quantize_by_search(weight, tensor.type, name=name))
        with torch.inference_mode():
            return self._compensate(tensor, weight, name, self._tied_products)

    @cached_property
    def _runner(self) -> LayerRunner:
        dtype = resolve_dtype(self.options.dtype, self.checkpoint.dtype)
        return LayerRunner(self.checkpoint, self._device, dtype)

    @cached_property
    def _call(self) -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
        return self._runner.caller(self._tokens_ST.shape[1])

    @cached_property
    def _batches_BTH(self) -> list[torch.Tensor]:
        """Hidden states that enter layer `_next`, on the CPU."""
        self._runner.embed(self._tokens_ST)  # refuses tokens that have no row, and damaged rows
        rows, inverse_ST = torch.unique(self._tokens_ST, return_inverse=True)
        planned = self._planned[self.checkpoint.embedding]
        used = self.checkpoint.read(planned.name)[rows]
        packed = self._pack_embedding(planned, used, f"{self.checkpoint.folder}: {planned.name}")
        stored = _numbers(packed.data, planned.type, used.shape).to(self._runner.dtype)
        return [stored[batch_BT] for batch_BT in inverse_ST.split(self.options.batch_size)]

    def _pass_until(self, layer: int) -> None:
        """Bring the hidden states to a layer, through those before it as their finished shards store them."""
        batches_BTH = self._batches_BTH  # before a layer is taken: it may run all layers itself
        while self._next < layer:
            with self._runner.layer(self._next) as module:
                shard = read_tensors(self.out / layer_file(self._next))
                prefix = self.checkpoint.family.layer_prefix(self._next)
                for linear in chain.from_iterable(self.checkpoint.shared_inputs(self._next)):
                    planned = self._planned[f"{prefix}{linear}.weight"]
                    self._set(module, linear, shard[planned.name].numpy(), planned)
                advance(module, self._call, batches_BTH, self._device)
            self._next += 1

    def _quantize_layer(self) -> None:
        """Pack the matrices of layer `_next`, and bring the hidden states past it."""
        batches_BTH = self._batches_BTH  # before the layer is taken: it may run all layers itself
        prefix = self.checkpoint.family.layer_prefix(self._next)
        with self._runner.layer(self._next) as module:
            for group in self.checkpoint.shared_inputs(self._next):
                tensors = {linear: self._planned[f"{prefix}{linear}.weight"] for linear in group}
                moments_II = factor_II = None
                if any(is_q4(tensor.type) for tensor in tensors.values()):
                    moments_II = input_products(module, self._call, batches_BTH, group[0], self._device)
                    factor_II = inverse_factor(moments_II, self.options.damping, name=tensors[group[0]].name)
                for linear, tensor in tensors.items():
                    weight = self.checkpoint.read(tensor.name)
                    name = f"{self.checkpoint.folder}: {tensor.name}"
                    if is_q4(tensor.type) and moments_II is not None:
                        packed = self._compensate(tensor, weight, name, moments_II, factor_II)
                        self._ready[tensor.name] = packed
                    else:
                        packed = rounded_to_nearest(tensor, weight, name)
                    self._set(module, linear, packed.data, tensor)
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
            factor_II = inverse_factor(moments_II, self.options.damping, name=name)
        data = quantize_by_gptq(weight, tensor.type, factor_II, moments_II.diagonal(), name=name)
        stored = _numbers(data, tensor.type, weight.shape)
        return Packed(data, error_by_products(weight.float(), stored, moments_II))

    @cached_property
    def _tied_products(self) -> torch.Tensor:
        """Moments of the output head's inputs in the original model."""
        batches_BTH = [
            self._runner.embed(batch_BT) for batch_BT in self._tokens_ST.split(self.options.batch_size)
        ]
        for layer in range(self.checkpoint.layer_count):
            with self._runner.layer(layer) as module:
                advance(module, self._call, batches_BTH, self._device)
        return self._head_products(batches_BTH)

    def _head_products(self, batches_BTH: list[torch.Tensor]) -> torch.Tensor:
        norm = final_norm(self.checkpoint, self._device, self._runner.dtype)
        head = nn.Sequential(norm, nn.Linear(self.checkpoint.hidden_size, 1, bias=False, device="meta"))
        return input_products(head, lambda module, batch: module(batch), batches_BTH, "1", self._device)

    def _set(self, module: nn.Module, linear: str, data: np.ndarray, tensor: PlannedTensor) -> None:
        """Let a linear layer compute with the numbers that are stored."""
        stored = _numbers(data, tensor.type, tensor.shape).to(self._device, self._runner.dtype)
        module.get_submodule(linear).weight = nn.Parameter(stored, requires_grad=False)


def quantize_by_gptq(
    weight: torch.Tensor,
    type: str,
    factor: torch.Tensor,
    importance: torch.Tensor | None = None,
    *,
    name: str = "the tensor",
) -> np.ndarray:
    """Numbers to blocks by error-compensated rounding.

    Args:
        weight: [rows, row_length], any floating dtype.
        type: `q4_0` or `q4_0_64`.
        factor: float32 [row_length, row_length]; what `inverse_factor` makes of the second moments of the inputs.
        importance: [row_length], the second moment of each input by itself: adds the scales that a search finds with
            it to those that are tried. None adds those of an unweighted search.
        name: of the tensor, for messages.

    Returns:
        uint8 [rows, bytes per row].

    Raises:
        CameraError: as `blocks.quantize`.
    """
    length = BLOCK_FORMATS[type].block_length
    weights = torch.ones(weight.shape[1]) if importance is None else importance.float()

    def rounding(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return compensated_codes(rows, factor, weights, length)

    return pack_rows(weight, type, rounding, _CHUNK_ROWS, name=name)


def inverse_factor(moments: torch.Tensor, damping: float, *, name: str = "the tensor") -> torch.Tensor:
    """The upper Cholesky factor U, UᵀU = (H + damping · mean(diag H) · I)⁻¹, of second moments H.

    A column whose input was never anything counts as an average one that is correlated with no other. Damping is
    raised tenfold as long as the matrix cannot be factored, which happens with fewer tokens than columns.

    Args:
        moments: [I, I], the sum of x·xᵀ over the inputs x of a layer, symmetric.
        damping: share of the mean diagonal that is added to the diagonal; above 0.
        name: of the tensor, for messages.

    Returns:
        float32 [I, I].

    Raises:
        CameraError: if the moments are not finite, or no damping makes them invertible.
    """
    matrix = moments.detach().cpu().double()
    if not matrix.isfinite().all():
        raise CameraError(
            f"{name}: the second moments of its inputs are not finite: calibrate in float32 (dtype)"
        )
    mean = matrix.diagonal().mean()
    if mean <= 0:
        return torch.eye(len(matrix))
    matrix = matrix / mean
    diagonal = matrix.diagonal()
    diagonal[diagonal == 0] = 1.0
    added = 0.0
    while damping <= _MOST_DAMPING:
        diagonal += damping - added
        added = damping
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return torch.as_tensor(upper, dtype=torch.float32)
        damping *= 10
    raise CameraError(f"{name}: the second moments of its inputs cannot be inverted: calibrate on more text")


def compensated_codes(
    weight: torch.Tensor, factor: torch.Tensor, importance: torch.Tensor, block_length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of every block.

    Args:
        weight: float32 [rows, row_length].
        factor: float32 [row_length, row_length], U.
        importance: float32 [row_length].
        block_length: of the format; divides row_length.

    Returns:
        codes float32 [rows, row_length], whole numbers from −8 to 7, and scales float32 [rows, blocks in a row].
    """
    rest = weight.clone()
    codes = torch.empty_like(rest)
    scales = torch.empty(len(rest), rest.shape[1] // block_length)
    for number, start in enumerate(range(0, rest.shape[1], block_length)):
        block = slice(start, start + block_length)
        inner = factor[block, block]
        block_LR = rest[:, block].T.contiguous()
        scale_CR = _scales_to_try(block_LR, inner, importance[block])
        codes_LCR, errors_LCR = _round_block(block_LR, scale_CR, inner)
        least_R = errors_LCR.square().sum(0).argmin(0)
        rows = torch.arange(len(rest))
        scales[:, number] = scale_CR[least_R, rows]
        codes[:, block] = codes_LCR[:, least_R, rows].T
        rest[:, block.stop :].addmm_(errors_LCR[:, least_R, rows].T, factor[block, block.stop :], alpha=-1)
    return codes, scales


def _scales_to_try(
    block_LR: torch.Tensor, inner_LL: torch.Tensor, importance_L: torch.Tensor
) -> torch.Tensor:
    """Scales [C, R] for the weights of a block: a few on a grid, and the best by two rules that know no compensation."""
    by_loss_L = inner_LL.diagonal().square().reciprocal()
    by_input_L = importance_L / importance_L.mean().clamp_min(_TINY)
    return scales_by_weightings(
        block_LR, torch.stack([by_loss_L / by_loss_L.mean(), by_input_L]), _SHRINK, _KEPT
    )


def _round_block(
    block_LR: torch.Tensor, scale_CR: torch.Tensor, inner_LL: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a block column by column with each of several scales.

    Returns:
        codes [L, C, R], and errors [L, C, R]: what each column's rounding left, over its U_jj.
    """
    rest_LCR = block_LR[:, None, :].repeat(1, len(scale_CR), 1)
    codes_LCR, errors_LCR = torch.empty_like(rest_LCR), torch.empty_like(rest_LCR)
    inverse_CR = torch.where(scale_CR == 0, 0.0, 1 / scale_CR)
    for column in range(len(rest_LCR)):
        torch.mul(rest_LCR[column], inverse_CR, out=codes_LCR[column]).round_().clamp_(LOWEST, HIGHEST)
        torch.addcmul(rest_LCR[column], codes_LCR[column], scale_CR, value=-1, out=errors_LCR[column])
        errors_LCR[column] /= inner_LL[column, column]
        following = rest_LCR[column + 1 :].flatten(1)
        following.addr_(inner_LL[column, column + 1 :], errors_LCR[column].flatten(), alpha=-1)
    return codes_LCR, errors_LCR


def _numbers(data: np.ndarray, type: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(blocks.dequantize(data, type, shape[-1])).reshape(shape)


QUANTIZATION_METHODS.register("gptq", Gptq)
