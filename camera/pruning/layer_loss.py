"""What the model loses when a single layer is cut: measured for all layers in one walk.

Hidden states of the dense model go through the layers, and beside them, for every layer passed, those of the model in
which only that layer is cut. So each layer is read once from either model, and the price is memory for as many hidden
states of a few windows as there are layers.
"""

import torch
from torch import nn

from camera.checkpoints.checkpoint import Checkpoint
from camera.devices import resolve_device, resolve_dtype
from camera.errors import CameraError
from camera.evaluation.windows import pieces
from camera.layerwise.observers import final_norm
from camera.layerwise.runner import LayerRunner
from camera.options import CaptureOptions
from camera.progress import Progress, silent


def layer_losses(
    dense: Checkpoint,
    cut: Checkpoint,
    tokens_WT: torch.Tensor,
    options: CaptureOptions,
    progress: Progress = silent,
) -> list[float]:
    """For each layer the divergence of the model in which it alone is cut from the dense one.

    Args:
        dense: the model.
        cut: the same with every feed-forward network cut.
        tokens_WT: int64 [windows, tokens].
        options: batch size, dtype, device.
        progress: told (decoder layers done, all).

    Returns:
        Mean over tokens of KL(dense ‖ cut) of the next token, in nats.

    Raises:
        CameraError: if a weight is missing or not finite, or a model computes NaN or infinity.
    """
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, dense.dtype)
    walks = LayerRunner(dense, device, dtype), LayerRunner(cut, device, dtype)
    call = walks[0].caller(tokens_WT.shape[1])
    step = options.batch_size

    def run(module: nn.Module, hidden_WTH: torch.Tensor) -> torch.Tensor:
        return torch.cat([call(module, batch.to(device)).cpu() for batch in hidden_WTH.split(step)])

    with torch.inference_mode():
        dense_WTH = walks[0].embed(tokens_WT)
        cut_WTH: list[torch.Tensor] = []
        for layer in range(dense.layer_count):
            with walks[1].layer(layer) as module:
                cut_here_WTH = run(module, dense_WTH)
            with walks[0].layer(layer) as module:
                for index, hidden_WTH in enumerate(cut_WTH):
                    cut_WTH[index] = run(module, hidden_WTH)
                dense_WTH = run(module, dense_WTH)
            cut_WTH.append(cut_here_WTH)
            progress(layer + 1, dense.layer_count)
        losses = _divergences(dense, dense_WTH, cut_WTH, device, dtype)
    for layer, loss in enumerate(losses):
        if not 0 <= loss < float("inf"):
            raise CameraError(
                f"with layer {layer} cut the model computes NaN or infinity in {options.dtype}: capture in float32"
            )
    return losses


def _divergences(
    dense: Checkpoint,
    dense_WTH: torch.Tensor,
    cut_WTH: list[torch.Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> list[float]:
    """Mean KL(dense ‖ cut) of the next token for each of the hidden states that leave the last layer."""
    norm = final_norm(dense, device, dtype)
    head_VH = dense.read_finite(dense.head).to(device, dtype)
    totals = [0.0] * len(cut_WTH)
    tokens = dense_WTH.shape[0] * dense_WTH.shape[1]

    def log_probabilities(hidden_CH: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(norm(hidden_CH.to(device)), head_VH).float().log_softmax(-1)

    for piece in pieces(tokens, len(head_VH), models=2):
        log_p_CV = log_probabilities(dense_WTH.flatten(0, 1)[piece])
        p_CV = log_p_CV.exp()
        for index, hidden_WTH in enumerate(cut_WTH):
            log_q_CV = log_probabilities(hidden_WTH.flatten(0, 1)[piece])
            # Summed over tokens on the CPU: an NPU has no float64 sum.
            totals[index] += float((p_CV * (log_p_CV - log_q_CV)).sum(-1).cpu().double().sum())
    return [max(total / tokens, 0.0) if total == total else total for total in totals]
