"""The importance matrix: how much of each column's input the calibration tokens brought, in llama.cpp's own file.

Format (llama.cpp `tools/imatrix`): a GGUF whose `general.type` is `imatrix`, with the keys `imatrix.datasets`,
`imatrix.chunk_count` and `imatrix.chunk_size`, and for every matrix two float32 tensors: `NAME.in_sum2`, the sum of
squares of each input, and `NAME.counts`, the tokens that were summed. So `llama-quantize --imatrix` reads what we write.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.devices import resolve_device, resolve_dtype
from camera.digests import digest_json
from camera.errors import CameraError
from camera.files import atomic_file
from camera.formats.gguf_reader import open_gguf
from camera.layerwise.observers import final_norm, input_squares, squares
from camera.layerwise.runner import LayerRunner
from camera.models import named_weights
from camera.options import QuantizeOptions
from camera.progress import Progress, silent

_KIND = "imatrix"
_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class Imatrix:
    """Second moments of the inputs of a model's matrices."""

    sums: Mapping[str, torch.Tensor]
    """By Hugging Face name: float32 [row_length], Σ x² over the tokens."""
    counts: Mapping[str, int]
    """By the same names: how many tokens."""
    chunk_size: int
    """Tokens in a calibration window."""
    datasets: tuple[str, ...] = ()
    """Names of the texts that were read."""

    def importance(self, name: str) -> torch.Tensor | None:
        """Mean of x² for each column of a matrix, float32 [row_length]; None where nothing was gathered."""
        return self.sums[name] / self.counts[name] if name in self.sums else None

    @property
    def digest(self) -> str:
        """Hex sha256 of the numbers."""
        return digest_json(
            {
                name: [self.counts[name], np.asarray(self.sums[name], "<f4").tobytes().hex()]
                for name in sorted(self.sums)
            }
        )


def collect_imatrix(
    checkpoint: Checkpoint,
    tokens_ST: torch.Tensor,
    options: QuantizeOptions,
    progress: Progress = silent,
    *,
    datasets: tuple[str, ...] = (),
) -> Imatrix:
    """Gather the importance matrix of a checkpoint in one layer-by-layer pass; the model's own outputs propagate.

    A tied output head is the embedding's matrix, and its inputs count there, as in llama.cpp.

    Args:
        checkpoint: the model.
        tokens_ST: int64 [samples, tokens].
        options: batch size, dtype and device.
        progress: called with (decoder layers done, all).
        datasets: names of the texts that the tokens are of.

    Raises:
        CameraError: if a weight is missing or not finite, or the model computes NaN or infinity.
    """
    device = resolve_device(options.device)
    runner = LayerRunner(checkpoint, device, resolve_dtype(options.dtype, checkpoint.dtype))
    call = runner.caller(tokens_ST.shape[1])
    sums: dict[str, torch.Tensor] = {}
    with torch.inference_mode():
        batches_BTH = [runner.embed(batch_BT) for batch_BT in tokens_ST.split(options.batch_size)]
        for layer in range(checkpoint.layer_count):
            with runner.layer(layer) as module:
                squares_by_linear = input_squares(
                    module, call, batches_BTH, checkpoint.shared_inputs(layer), device
                )
                for linear, sums_I in squares_by_linear.items():
                    sums[f"{checkpoint.family.layer_prefix(layer)}{linear}.weight"] = sums_I
            progress(layer + 1, checkpoint.layer_count)
        norm = final_norm(checkpoint, device, runner.dtype)
        sums[checkpoint.head] = torch.stack(
            [squares(norm(batch_BTH.to(device))) for batch_BTH in batches_BTH]
        ).sum(0)
    for name, sums_I in sums.items():
        if not sums_I.float().isfinite().all():
            raise CameraError(
                f"{checkpoint.folder}: the inputs of {name} are NaN or infinite in {options.dtype}: calibrate in float32"
            )
    return Imatrix(
        {name: sums_I.float() for name, sums_I in sums.items()},
        dict.fromkeys(sums, tokens_ST.numel()),
        tokens_ST.shape[1],
        datasets,
    )


def write_imatrix(path: Path, imatrix: Imatrix, checkpoint: Checkpoint) -> None:
    """Write llama.cpp's file; the same numbers always give the same bytes.

    Raises:
        CameraError: if a tensor has no place in llama.cpp's model of this family.
    """
    family = checkpoint.family
    weights = named_weights(family, checkpoint.config)
    for name in imatrix.sums:
        if name not in weights:
            raise CameraError(
                f"{name} has no place in a GGUF file of architecture {family.gguf_architecture}"
            )
    with atomic_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, family.gguf_architecture or family.model_type)
        writer.add_type(_KIND)
        writer.add_array("imatrix.datasets", list(imatrix.datasets) or ["unknown"])
        tokens = max(imatrix.counts.values(), default=0)
        writer.add_uint32("imatrix.chunk_count", max(1, tokens // imatrix.chunk_size))
        writer.add_uint32("imatrix.chunk_size", imatrix.chunk_size)
        for name, sums_I in imatrix.sums.items():
            writer.add_tensor(weights[name].gguf + _SUMS, sums_I.float().numpy()[None])
            writer.add_tensor(weights[name].gguf + _COUNTS, np.array([[imatrix.counts[name]]], np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read_imatrix(path: Path | str, checkpoint: Checkpoint) -> Imatrix:
    """Read a file of ours or of `llama-imatrix`, for the matrices of a checkpoint.

    Tensors that the checkpoint has no matrix for are left aside, as llama-quantize does.

    Raises:
        CameraError: if it is no such file, is damaged, or does not fit the checkpoint.
    """
    file = open_gguf(path)
    if file.metadata.get("general.type") != _KIND:
        raise CameraError(f"{path} holds no importance matrix (general.type is not `{_KIND}`)")
    weights = named_weights(checkpoint.family, checkpoint.config)
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    for name, info in checkpoint.needed.items():
        gguf_name = weights[name].gguf if name in weights else ""
        if gguf_name + _SUMS not in file.tensors or len(info.shape) != 2:
            continue
        sums_I = file.dequantize(gguf_name + _SUMS).reshape(-1)
        count = float(file.dequantize(gguf_name + _COUNTS).reshape(-1)[0])
        if len(sums_I) != info.shape[1]:
            raise CameraError(
                f"{path}: {gguf_name} has {len(sums_I)} columns and {name} has {info.shape[1]}: "
                "it was made from another model"
            )
        if not sums_I.isfinite().all() or bool((sums_I < 0).any()) or not 0 < count < float("inf"):
            raise CameraError(f"{path}: {gguf_name} is not a sum of squares: make the file again")
        sums[name], counts[name] = sums_I, round(count)
    if not sums:
        raise CameraError(f"{path} has no tensor of {checkpoint.folder}: it was made from another model")
    datasets = file.metadata.get("imatrix.datasets", [])
    return Imatrix(sums, counts, file.value("imatrix.chunk_size", int), tuple(map(str, datasets)))
