"""Which tensors of a folder's files are the model's: shards joined, left-overs set aside, quantised weights refused."""

import logging
import re
from collections.abc import Iterable, Mapping
from fnmatch import translate
from functools import cache
from pathlib import Path

import torch

from camera.checkpoints.rows import StoredRows
from camera.checkpoints.safetensors_file import TensorInfo, read_header
from camera.checkpoints.weights import INDEX_NAME, check_index, placed_by_index, weight_files
from camera.errors import CameraError
from camera.units import few

_log = logging.getLogger(__name__)


def _any(*patterns: str) -> re.Pattern[str]:
    """Any of some shell patterns; a checkpoint may have a hundred thousand names."""
    return re.compile("|".join(map(translate, patterns)))


_LEFT_OVER = _any(
    *("v_head.*", "value_head.*", "pretrained_model.v_head.*"),  # the value of a state: trl, OpenRLHF
    *("score.*", "score_head.*", "reward_head.*", "rm_head.*", "classifier.*"),  # rewards and labels
)
"""What trainers leave beside a language model; transformers reads none of it."""
_ADAPTER = _any(
    "*.lora_A.*", "*.lora_B.*", "*.lora_embedding_*", "*.lora_magnitude_vector*", "*.base_layer.*"
)
_PACKED = _any(
    *("*.qweight", "*.qzeros", "*.g_idx", "*.weight_packed", "*.weight_scale", "*.weight_scale_inv"),
    *("*.absmax", "*.quant_state.*", "*.SCB", "*.scales"),
)
"""Names of numbers that only mean something together with others: GPTQ, AWQ, compressed-tensors, bitsandbytes, MLX."""


def model_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of the model by name, in file order, then in the order of the bytes; reads headers.

    A tensor that two files hold is taken from the one that the index names, if both hold the same.

    Raises:
        CameraError: if a file is missing or damaged, two files disagree, or the weights are quantised or an adapter's.
    """
    headers = {file: read_header(folder / file) for file in weight_files(folder)}
    placed = placed_by_index(folder)
    check_index(folder, headers, placed)
    found: dict[str, TensorInfo] = {}
    for file, header in headers.items():
        for name, info in header.items():
            first = found.get(name)
            if first is not None and not _equal(folder, name, first, info):
                raise CameraError(
                    f"{folder}: {first.file} and {file} both hold {name}, and not the same numbers: fetch the model "
                    f"again, or remove it from the one that {INDEX_NAME} does not name"
                )
            if first is None or placed.get(name) == file:
                found.pop(name, None)
                found[name] = info
    _refuse_what_is_no_model(folder, found)
    for name, info in found.items():
        if not info.size_bytes and not _LEFT_OVER.match(name):
            raise CameraError(
                f"{folder} has {name} of shape {list(info.shape)}, without a number: fetch the model again"
            )
    left_over = tuple(filter(_LEFT_OVER.match, found))
    if left_over:
        _tell_left_over(folder, left_over)
    for name in left_over:
        del found[name]
    return found


def same_numbers(folder: Path, one: str, other: str, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether two tensors of a checkpoint hold the same; reads them until they differ."""
    return _equal(folder, one, tensors[one], tensors[other], other)


def _equal(folder: Path, name: str, one: TensorInfo, other: TensorInfo, other_name: str = "") -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    stored = (
        StoredRows(folder / one.file, name, one),
        StoredRows(folder / other.file, other_name or name, other),
    )
    return all(map(torch.equal, *(rows.chunks() for rows in stored)))


def _refuse_what_is_no_model(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        if _ADAPTER.match(name):
            raise CameraError(
                f"{folder} has {name}, of an adapter that is not merged into the model: merge it first (peft: "
                "merge_and_unload(), then save_pretrained)"
            )
        if _PACKED.match(name):
            raise CameraError(
                f"{folder} has {name}: the weights are quantised already, and what is measured and pruned are "
                "floating-point numbers. Dequantise the checkpoint to bfloat16 first, or take the original"
            )


@cache
def _tell_left_over(folder: Path, names: tuple[str, ...]) -> None:
    """Once in a process: a run opens its model many times."""
    _log.warning("%s holds %s, which no language model reads (a trainer's): left out", folder, few(names))
