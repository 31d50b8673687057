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
from camera.quantization.mixed import choose_types
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
        tokens_ST: int64 [samples, tokens], to calibrate on; `rtn` without a target needs none.
        imatrix: for `search` and `target_bpw`, in place of tokens.
        progress: told the tensors done and in all.

    Raises:
        CameraError: as `quantize_checkpoint`; if the method or the target lacks what it calibrates on; if no types come to
            the target; if the model computes NaN or infinity.
    """
    source = None if imatrix is None else imatrix.digest
    if options.target_bpw is not None:
        if imatrix is None:
            imatrix = collect_imatrix(checkpoint, _wanted(tokens_ST, "target_bpw", file=True), options)
        options = choose_types(checkpoint, options, imatrix)
    packer: Packer | None = None
    if options.method == "search" and imatrix is not None:
        known = imatrix
        packer = SearchPacker(source or digest_tokens(_wanted(tokens_ST, "", file=True)), lambda: known)
    elif options.method == "search":
        tokens = _wanted(tokens_ST, "method: search", file=True)
        packer = SearchPacker(digest_tokens(tokens), lambda: collect_imatrix(checkpoint, tokens, options))
    elif options.method == "gptq":
        packer = GptqPacker(checkpoint, _wanted(tokens_ST, "method: gptq", file=False), options, out)
    return quantize_checkpoint(checkpoint, out, options, progress, packer)


def _wanted(tokens_ST: torch.Tensor | None, by: str, *, file: bool) -> torch.Tensor:
    if tokens_ST is None:
        wanted = "calibration tokens, or an imatrix" if file else "calibration tokens"
        raise CameraError(f"quantize.{by} needs {wanted}")
    return tokens_ST
