"""The importance matrix: how much of each column's input the calibration tokens brought, in llama.cpp's own file.

Format (llama.cpp `tools/imatrix`): a GGUF whose `general.type` is `imatrix`, with the keys `imatrix.datasets`,
`imatrix.chunk_count` and `imatrix.chunk_size`, and for every matrix two float32 tensors: `NAME.in_sum2`, the sum of
squares of each input, and `NAME.counts`, the tokens that were summed. So `llama-quantize --imatrix` reads what we write.

Of a tensor that holds the experts of a layer, `in_sum2` has a row for each expert (ggml's [columns, experts]), over the tokens
that the router sends it, and `counts` a number for each ([1, experts]); an expert without tokens has zeros. What enters down
is not multiplied by the router's weight.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.devices import resolve_device, resolve_dtype
from camera.digests import digest_json
from camera.errors import CameraError, understood
from camera.files import atomic_file
from camera.formats.gguf_reader import open_gguf
from camera.layerwise.experts_pass import ExpertsPass
from camera.layerwise.observers import final_norm, input_squares
from camera.layerwise.runner import LayerRunner
from camera.layerwise.sums import ExactSum, sample_squares
from camera.models import Placed, named_weights
from camera.models.experts import Config
from camera.options import QuantizeOptions
from camera.progress import Progress, silent
from camera.quantization.hidden_states import HiddenStates
from camera.quantization.imatrix_dat import read_dat

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
        """Mean of x² for each column of a matrix, float32 [row_length]; None where nothing was gathered, as of an expert
        that no token came to."""
        count = self.counts.get(name, 0)
        return self.sums[name] / count if count else None

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
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    with torch.inference_mode():
        states = HiddenStates(runner, runner.embed(tokens_ST), options.batch_size)
        for layer in range(checkpoint.layer_count):
            prefix = checkpoint.family.layer_prefix(layer)
            with runner.layer(layer) as module:
                with input_squares(module, states.linears(layer)) as by_linear:
                    if checkpoint.is_sparse(layer):
                        run = states.experts(layer, module)
                        _add_experts(run, checkpoint.config, sums, counts)
                        run.finish()
                    else:
                        states.advance(module)
                sums |= {f"{prefix}{linear}.weight": sums_I for linear, sums_I in by_linear.items()}
            progress(layer + 1, checkpoint.layer_count)
        norm = final_norm(checkpoint, device, runner.dtype)
        head_H = ExactSum((checkpoint.hidden_size,), device)
        for batch_BTH in states.batches_BTH:
            head_H.add(sample_squares(norm(batch_BTH.to(device))))
        sums[checkpoint.head] = head_H.read()
    for name, sums_I in sums.items():
        if not sums_I.float().isfinite().all():
            raise CameraError(
                f"{checkpoint.folder}: the inputs of {name} are NaN or infinite in {options.dtype}: calibrate in float32"
            )
    return Imatrix(
        {name: sums_I.float() for name, sums_I in sums.items()},
        {name: counts.get(name, tokens_ST.numel()) for name in sums},
        tokens_ST.shape[1],
        datasets,
    )


def _add_experts(
    run: ExpertsPass, config: Config, sums: dict[str, torch.Tensor], counts: dict[str, int]
) -> None:
    """The matrices of a layer's experts, over the tokens of each, and of the network that they share."""
    for block in run.blocks:
        inputs_H = ExactSum((run.hidden_size,), run.device)
        act_F = ExactSum((block.width(config),), run.device)
        tokens = 0
        for hidden_NH in run.inputs(block):
            inputs_H.add(sample_squares(hidden_NH))
            tokens += len(hidden_NH)

        def see(act_NF: torch.Tensor, act_F: ExactSum = act_F) -> None:
            act_F.add(sample_squares(act_NF))

        run.put_out(block, None, {}, see)
        hidden_H = inputs_H.read()
        sums |= {block.gate: hidden_H, block.up: hidden_H, block.down: act_F.read()}
        counts |= dict.fromkeys(block.names, tokens)


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
        for gguf_name, names in _stored_together(imatrix, weights).items():
            sums_EI = torch.stack([imatrix.sums[name].float() for name in names])
            counts_E1 = np.array([[imatrix.counts[name]] for name in names], np.float32)
            writer.add_tensor(gguf_name + _SUMS, sums_EI.numpy())
            writer.add_tensor(gguf_name + _COUNTS, counts_E1)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _stored_together(imatrix: Imatrix, weights: Mapping[str, Placed]) -> dict[str, list[str]]:
    """Names of the matrices by the tensor of a GGUF file that they are in: one, or those of a layer's experts in order.

    What a file holds in parts is left out: llama.cpp multiplies other inputs by them.
    """
    found: dict[str, list[str]] = {}
    for name in sorted(imatrix.sums, key=lambda name: weights[name].expert or 0):
        if not weights[name].weight.parts:
            found.setdefault(weights[name].gguf, []).append(name)
    return found


def read_imatrix(path: Path | str, checkpoint: Checkpoint) -> Imatrix:
    """Read a file of ours or of `llama-imatrix`, of today (GGUF) or before (`.dat`), for the matrices of a checkpoint.

    Tensors that the checkpoint has no matrix for are left aside, as llama-quantize does.

    Raises:
        CameraError: if it is no such file, is damaged, or does not fit the checkpoint.
    """
    with understood(str(path), "make the file again"):
        return _read(Path(path), checkpoint)


def _read(path: Path, checkpoint: Checkpoint) -> Imatrix:
    stored = _of_gguf(path) if _is_gguf(path) else _of_dat(path)
    weights = named_weights(checkpoint.family, checkpoint.config)
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    for name, info in checkpoint.needed.items():
        placed = weights.get(name)
        gguf_name = "" if placed is None else placed.gguf
        if placed is None or gguf_name not in stored.names or len(info.shape) != 2:
            continue
        matrices = 1 if placed.expert is None else checkpoint.expert_count
        sums_EI, counts_E = stored.read(gguf_name)
        if stored.one_count:
            sums_EI, counts_E = sums_EI.reshape(-1, info.shape[1]), counts_E.expand(matrices)
        for found, what, expected in (
            (sums_EI.shape[1], "columns", info.shape[1]),
            (len(sums_EI), "matrices", matrices),
            (len(counts_E), "counts", matrices),
        ):
            if found != expected:
                raise CameraError(
                    f"{path}: {gguf_name} has {found} {what} and {name} has {expected}: it was made from another model"
                )
        at = placed.expert or 0
        sums_I, count = sums_EI[at], float(counts_E[at])
        least = 0 if matrices > 1 else 1  # an expert may have had no tokens
        if not sums_I.isfinite().all() or bool((sums_I < 0).any()) or not least <= count < float("inf"):
            raise CameraError(f"{path}: {gguf_name} is not a sum of squares: make the file again")
        sums[name], counts[name] = sums_I, round(count)
    if not sums:
        raise CameraError(f"{path} has no tensor of {checkpoint.folder}: it was made from another model")
    return Imatrix(sums, counts, stored.chunk_size, stored.datasets)


@dataclass(frozen=True)
class _StoredSums:
    """What a file holds, by llama.cpp's names of the tensors."""

    names: frozenset[str]
    read: Callable[[str], tuple[torch.Tensor, torch.Tensor]]
    """Sums [matrices, columns] and counts [matrices] of a tensor."""
    chunk_size: int
    datasets: tuple[str, ...]
    one_count: bool = False
    """Whether there are sums in one row and one count for all matrices of a tensor."""


def _is_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError as error:
        raise CameraError(f"{path} cannot be read: {error}") from None


def _of_gguf(path: Path) -> _StoredSums:
    file = open_gguf(path)
    if file.metadata.get("general.type") != _KIND:
        raise CameraError(f"{path} holds no importance matrix (general.type is not `{_KIND}`)")
    dequantize = cache(file.dequantize)

    def read(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        sums_EI, counts_E = dequantize(name + _SUMS), dequantize(name + _COUNTS).reshape(-1)
        return sums_EI.reshape(-1, sums_EI.shape[-1]), counts_E

    names = frozenset(name.removesuffix(_SUMS) for name in file.tensors if name.endswith(_SUMS))
    datasets = file.metadata.get("imatrix.datasets", [])
    return _StoredSums(names, read, file.value("imatrix.chunk_size", int), tuple(map(str, datasets)))


def _of_dat(path: Path) -> _StoredSums:
    entries, text = read_dat(path)

    def read(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        sums_I, summed = entries[name]
        return sums_I, torch.tensor([float(summed)])

    # Of a chunk's tokens nothing is known: it counts as one.
    return _StoredSums(frozenset(entries), read, 1, () if text is None else (text,), one_count=True)
