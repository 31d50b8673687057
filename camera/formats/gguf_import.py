"""From a GGUF file to a Hugging Face folder: config, weights in shards, tokenizer, chat template, generation config."""

from collections import Counter
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import SafetensorsWriter
from camera.checkpoints.weights import IMPORT_NAME, INDEX_NAME, SINGLE_NAME
from camera.digests import digest_file
from camera.errors import CameraError
from camera.files import write_json
from camera.formats.gguf_file import GgufFile, numbers
from camera.formats.gguf_model import hf_config, hf_names, hf_shape, packed_hf_tensor, read_hf_tensor
from camera.formats.gguf_reader import open_gguf
from camera.formats.gguf_to_tokenizer import read_tokenizer
from camera.mapped import release_pages
from camera.models import Placed, family_of
from camera.progress import Progress, silent
from camera.results import Result

SHARD_BYTES = 4 << 30
"""Of weights in one file, unless a single tensor has more."""
DType = Literal["auto", "float32", "bfloat16", "float16"]
_NUMBERS_AT_ONCE = 8 << 20
_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


class ImportReport(Result):
    """What `import.json` holds."""

    file: str
    """Name of the GGUF file."""
    sha256: str
    """Of the file."""
    bytes: int
    """Of the file."""
    architecture: str
    """`general.architecture`."""
    model_type: str
    """`model_type` of config.json."""
    parameters: int
    types: dict[str, int]
    """How many tensors of each type the file holds."""
    dtype: str
    """Of the weights in the folder; what a family keeps in float32 is float32 besides."""
    rounded: int
    """Tensors with numbers that the dtype does not hold exactly; with 0 every number is the file's."""
    rounding_error: float
    """RMS of (stored − the file's) over the RMS of the file's numbers, all tensors together."""
    unknown: tuple[str, ...]
    """What the source of the file had and the folder lacks, a sentence each."""


def import_file(path: Path, out: Path, dtype: DType = "auto", progress: Progress = silent) -> ImportReport:
    """Write the model of a GGUF file as a Hugging Face folder.

    One tensor is in memory, of one whose rows need no other order some rows only. Query and key get the order of rows that
    transformers computes with.

    Args:
        path: a GGUF file of a supported architecture, its tensors of any type that the gguf library turns into numbers.
        out: an existing, empty folder.
        dtype: of the weights; `auto` is the narrowest of the file's own float types that holds every number, float32
            where tensors are quantised.
        progress: told (tensors done, all).

    Raises:
        CameraError: if the file is damaged, of another architecture, lacks a tensor, has layers of several widths, or a
            tokenizer that cannot be written; if a number is not finite, or too large for the dtype.
    """
    file = open_gguf(path)
    config, names = hf_config(file), hf_names(file)
    placed = family_of(config, str(path)).names(config)
    if missing := placed.keys() - names.keys():
        raise CameraError(
            f"{path} has no tensor for {min(missing)}: it is unfinished, fetch or write it again"
        )
    for name in names:
        _check_shape(file, name, placed[name], config)
    tokenizer = read_tokenizer(file)
    chosen = _dtype(file, names, placed) if dtype == "auto" else getattr(torch, dtype)
    config["dtype"] = str(chosen).removeprefix("torch.")
    rounding = _write_weights(file, out, {name: placed[name] for name in names}, chosen, progress)
    write_json(out / "config.json", config)
    tokenizer.write(out)
    if (generation := generation_config(file, config)) is not None:
        write_json(out / "generation_config.json", generation)
    _write_card(file, out)
    report = ImportReport(
        file=path.name,
        sha256=digest_file(path),
        bytes=path.stat().st_size,
        architecture=file.architecture,
        model_type=config["model_type"],
        parameters=sum(prod(hf_shape(file, name)) for name in names),
        types=dict(Counter(tensor.type for tensor in file.tensors.values()).most_common()),
        dtype=config["dtype"],
        rounded=rounding.tensors,
        rounding_error=rounding.error,
        unknown=(*_unknown(file), *tokenizer.unknown),
    )
    write_json(out / IMPORT_NAME, report.model_dump(mode="json"))
    Checkpoint.open(out).check_shapes()
    return report


class _Rounding:
    """What casting to the dtype loses."""

    def __init__(self) -> None:
        self.tensors = 0
        self._noise = self._power = 0.0

    def add(self, exact: torch.Tensor, stored: torch.Tensor) -> bool:
        """Count a part of a tensor; whether it lost anything."""
        self._power += float(exact.double().square().sum())
        if torch.equal(exact, back := stored.float()):
            return False
        self._noise += float((back.double() - exact.double()).square().sum())
        return True

    @property
    def error(self) -> float:
        return float(f"{(self._noise / self._power) ** 0.5 if self._power else 0.0:.6g}")


def _write_weights(
    file: GgufFile, out: Path, placed: dict[str, Placed], dtype: torch.dtype, progress: Progress
) -> _Rounding:
    """Write all tensors, and an index where they are several files."""
    layout = {
        name: (torch.float32 if place.weight.exact else dtype, hf_shape(file, name))
        for name, place in placed.items()
    }
    sizes = {name: prod(shape) * kind.itemsize for name, (kind, shape) in layout.items()}
    shards = list(_shards(sizes))
    files = [
        SINGLE_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    rounding, done = _Rounding(), 0
    for shard, names in zip(files, shards, strict=True):
        with SafetensorsWriter(out / shard, {name: layout[name] for name in names}) as writer:
            for name in names:
                rounding.tensors += _write_tensor(file, writer, name, layout[name], rounding)
                done += 1
                progress(done, len(layout))
    if len(files) > 1:
        weight_map = {name: shard for shard, names in zip(files, shards, strict=True) for name in names}
        metadata = {"total_size": sum(sizes.values())}
        write_json(out / INDEX_NAME, {"metadata": metadata, "weight_map": weight_map})
    return rounding


def _shards(sizes: dict[str, int]) -> Iterator[list[str]]:
    """The names of the tensors of each file, in order."""
    names: list[str] = []
    for name in sizes:
        if names and sum(sizes[each] for each in names) + sizes[name] > SHARD_BYTES:
            yield names
            names = []
        names.append(name)
    yield names


def _write_tensor(
    file: GgufFile,
    writer: SafetensorsWriter,
    name: str,
    layout: tuple[torch.dtype, tuple[int, ...]],
    rounding: _Rounding,
) -> bool:
    """Write one tensor, some rows at a time; whether its dtype lost anything."""
    dtype, shape = layout
    lost, start = False, 0
    for rows in _rows(file, name, shape):
        stored = rows.to(dtype)
        if rows.numel() and not all(map(torch.isfinite, stored.aminmax())):
            finite = all(map(torch.isfinite, rows.aminmax()))
            what = (
                f"holds numbers too large for {dtype}: take bfloat16 or float32"
                if finite
                else "holds NaN or infinity"
            )
            raise CameraError(f"{file.path}: {name} {what}")
        lost |= rounding.add(rows, stored)
        writer.write_rows(name, start, stored)
        start += len(stored)
    return lost


def _rows(file: GgufFile, name: str, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
    """A tensor's numbers in float32, some rows at a time."""
    type, data = packed_hf_tensor(file, name)
    if len(data) == 1 or len(shape) != 2:
        yield read_hf_tensor(file, name)
        return
    step = max(1, _NUMBERS_AT_ONCE // shape[1])
    for start in range(0, len(data), step):
        part = data[start : start + step]
        yield torch.from_numpy(np.array(numbers(part, type, shape[1], f"{file.path}: {name}")))
        release_pages(part)


def _check_shape(file: GgufFile, name: str, placed: Placed, config: dict[str, Any]) -> None:
    found, expected = hf_shape(file, name), family_of(config).shape(config, placed.weight)
    if found != expected:
        raise CameraError(
            f"{file.path}: {name} has shape {list(found)}, and the file's keys ask for {list(expected)}: it is damaged, "
            "or a model of layers that differ, which no config.json can describe"
        )


def _dtype(file: GgufFile, names: dict[str, str], placed: dict[str, Placed]) -> torch.dtype:
    """The narrowest float type of the file's that holds every number of the folder's."""
    types = {tensor.type for tensor in file.tensors.values()}
    narrow = {_DTYPES[type] for type in types & {"f16", "bf16"}}
    if len(narrow) != 1 or types - _DTYPES.keys():
        return torch.float32
    dtype = narrow.pop()
    weights = {name: placed[name].weight for name in names}
    others = (
        read_hf_tensor(file, name)
        for name, weight in weights.items()
        if not weight.exact and (weight.stored_plus or file.tensors[names[name]].type == "f32")
    )
    return dtype if all(torch.equal(each, each.to(dtype).float()) for each in others) else torch.float32


_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


def generation_config(file: GgufFile, config: dict[str, Any]) -> dict[str, Any] | None:
    """generation_config.json: the special tokens, what else ends a text, and how to sample where the file says it."""
    found: dict[str, Any] = {
        key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config
    }
    ends = [file.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    if len(eos := [each for each in dict.fromkeys(ends) if isinstance(each, int)]) > 1:
        found["eos_token_id"] = eos
    sampling = {
        key: file.value(stored, type(file.metadata[stored]))
        for name, key in _SAMPLING.items()
        if (stored := f"general.sampling.{name}") in file.metadata
    }
    if sampling:
        found |= {"do_sample": True, **sampling}
    return found or None


def _write_card(file: GgufFile, out: Path) -> None:
    """README.md with the licence and languages, where the file states them: other cards take them from there."""
    front = {
        key: file.metadata[stored]
        for stored, key in {
            "general.license": "license",
            "general.license.name": "license_name",
            "general.license.link": "license_link",
            "general.languages": "language",
        }.items()
        if file.metadata.get(stored)
    }
    name = file.metadata.get("general.name") or file.path.stem
    text = f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n" if front else ""
    text += f"# {name}\n\nImported from the GGUF file `{file.path.name}` by `camera import`.\n"
    (out / "README.md").write_text(text, encoding="utf-8")


def _unknown(file: GgufFile) -> Iterator[str]:
    """What of the weights and the config a file cannot say."""
    quantised = sorted({tensor.type for tensor in file.tensors.values()} - _DTYPES.keys())
    if quantised:
        yield (
            f"the weights before they were rounded to {', '.join(quantised)}: the folder holds the rounded numbers, "
            "and quantising it again to another type rounds a second time"
        )
    yield "keys of config.json that GGUF has no name for, such as initializer_range: they are transformers' defaults"
