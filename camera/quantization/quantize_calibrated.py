"""Quantise with what calibration tokens tell: the folder is `quantize_checkpoint`'s, the rounding is not."""

from pathlib import Path

import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.errors import CameraError
from camera.formats.quantize import Packer, quantize_checkpoint
from camera.formats.quantized_model import QuantizeReport
from camera.options import QuantizeOptions
from camera.progress import Progress, silent
from camera.quantization.imatrix import Imatrix, collect_imatrix
from camera.quantization.packers import GptqPacker, SearchPacker, digest_tokens


def quantize_calibrated(
    checkpoint: Checkpoint,
    out: Path,
    options: QuantizeOptions,
    tokens_ST: torch.Tensor | None = None,
    imatrix: Imatrix | None = None,
    progress: Progress = silent,
) -> QuantizeReport:
    """Write a folder with every tensor packed by `options.method`; it resumes as `quantize_checkpoint` does.

    Args:
        checkpoint: the source.
        out: the folder to write.
        options: types, method, and how to calibrate.
        tokens_ST: int64 [samples, tokens], to calibrate on; `rtn` needs none.
        imatrix: for `search`, in place of tokens.
        progress: told the tensors done and in all.

    Raises:
        CameraError: as `quantize_checkpoint`; if the method lacks what it calibrates on; if the model computes NaN or
            infinity.
    """
    return quantize_checkpoint(
        checkpoint, out, options, progress, _packer(checkpoint, out, options, tokens_ST, imatrix)
    )


def _packer(
    checkpoint: Checkpoint,
    out: Path,
    options: QuantizeOptions,
    tokens_ST: torch.Tensor | None,
    imatrix: Imatrix | None,
) -> Packer | None:
    if options.method == "rtn":
        return None
    if options.method == "search" and imatrix is not None:
        return SearchPacker(imatrix.digest, lambda: imatrix)
    if tokens_ST is None:
        wanted = "calibration tokens, or an imatrix" if options.method == "search" else "calibration tokens"
        raise CameraError(f"quantize.method: {options.method} needs {wanted}")
    if options.method == "search":
        return SearchPacker(digest_tokens(tokens_ST), lambda: collect_imatrix(checkpoint, tokens_ST, options))
    return GptqPacker(checkpoint, tokens_ST, options, out)
