"""From weights on disk, in any form that we read, to a transformers model on a device."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.names_in_model import dtype_in_model, names_in_model
from camera.devices import resolve_device, resolve_dtype
from camera.errors import CameraError
from camera.formats.blocks import dequantize
from camera.formats.gguf_reader import hf_config, hf_names, open_gguf, packed_hf_tensor, read_hf_tensor
from camera.formats.quantized_model import SUMMARY_NAME, QuantizedModel, packed_shape
from camera.formats.types.floats import Float
from camera.mapped import release_pages
from camera.models import Family, family_of
from camera.options import BlockType
from camera.registry import BLOCK_FORMATS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Joined = Mapping[str, tuple[int | slice, ...]]
"""What a parameter is made of: the index of the part that each matrix fills, by the name in the source."""
Rebuild = Callable[["PreTrainedModel", Mapping[str, str]], Mapping[str, Joined]]
"""From a model on the meta device, and the source's names by those in the model: exchanges modules, and says which
parameters are made of several matrices. What is not on the meta device afterwards is not read again."""
_NUMBERS_AT_ONCE = 8 << 20
"""Of a matrix of blocks, dequantised at once."""


@dataclass(frozen=True)
class Source:
    """A model's config and its weights by Hugging Face name, read one at a time."""

    path: Path
    config: "PreTrainedConfig"
    family: Family
    names: frozenset[str]
    dtype: torch.dtype
    """What `dtype: auto` means: the checkpoint's own, or that of the matrices of a GGUF. Of one whose matrices are
    blocks it is float32, which holds their numbers exactly."""
    read: Callable[[str], torch.Tensor]
    """One tensor on the CPU, in floating point."""
    weight_files: tuple[Path, ...] = ()
    """The files that hold them; others may lie beside."""
    packed: Callable[[str], tuple[str, np.ndarray]] | None = None
    """Where tensors are stored as blocks: one tensor's type and its bytes, uint8 [rows, bytes per row]."""


def open_source(path: Path | str) -> Source:
    """Open a checkpoint folder, a folder of packed tensors (`camera.quantization`) or a GGUF file.

    Reads no weights.

    Raises:
        CameraError: if it is none of these, damaged, or of a family that is not supported.
    """
    path = Path(path)
    if path.is_file():
        return _gguf_source(path)
    if (path / SUMMARY_NAME).is_file():
        return _quantized_source(path)
    checkpoint = Checkpoint.open(path)
    return Source(
        path,
        checkpoint.hf_config,
        checkpoint.family,
        frozenset(checkpoint.needed),
        checkpoint.dtype,
        checkpoint.read,
        tuple(path / file for file in checkpoint.weight_files),
    )


def _quantized_source(path: Path) -> Source:
    model = QuantizedModel.open(path)
    config = _hf_config(model.config, path)
    dtype = getattr(config, "dtype", None) or torch.float32
    return Source(
        path,
        config,
        model.family,
        frozenset(model.tensors),
        dtype,
        model.dequantize,
        tuple(path / shard.file for shard in model.report.shards),
        lambda name: _stored_blocks(model, name),
    )


def _stored_blocks(model: QuantizedModel, name: str) -> tuple[str, np.ndarray]:
    """A map of the tensor's bytes alone, whose pages can be released."""
    record, (file, offset) = model.tensors[name], model.stored(name)
    return record.type, np.memmap(file, np.uint8, "r", offset, packed_shape(record.type, record.shape))


def _gguf_source(path: Path) -> Source:
    if path.suffix != ".gguf":
        raise CameraError(f"{path} is a file but no .gguf: give a GGUF file or the folder of a checkpoint")
    file = open_gguf(path)
    values, names = hf_config(file), hf_names(file)
    family = family_of(values, str(path))
    matrix = names.get(family.blocks(values, 0)[0].names[0])
    stored = file.tensors[matrix].type if matrix else ""
    dtypes = {form.name: form.dtype for form in BLOCK_FORMATS.values() if isinstance(form, Float)}
    dtype = dtypes.get(stored, torch.float32)
    return Source(
        path,
        _hf_config(values, path),
        family,
        frozenset(names),
        dtype,
        lambda name: read_hf_tensor(file, name),
        (path,),
        lambda name: packed_hf_tensor(file, name),
    )


def _hf_config(values: dict[str, Any], path: Path) -> "PreTrainedConfig":
    from transformers import CONFIG_MAPPING  # heavy; only computing needs it

    family = family_of(values, str(path))
    family.register()
    try:
        return CONFIG_MAPPING[family.model_type].from_dict(values)
    except Exception as error:  # its checked dataclasses raise types of their own
        raise CameraError(f"{path}: its config is refused by transformers: {error}") from None


def load_model(path: Path | str, dtype: str = "auto", device: str = "auto") -> "PreTrainedModel":
    """The whole model on a device, in eval mode; quantised weights are dequantised.

    The host holds one tensor at a time beside the model.

    Args:
        path: as for `open_source`.
        dtype: `auto`, `float32`, `bfloat16` or `float16`: what weights are held and layers compute in.
        device: `auto`, `cpu`, `cuda[:N]` or `npu[:N]`.

    Raises:
        CameraError: as `open_source`; or if a tensor is missing, is misshapen, or holds NaN or infinity.
    """
    source = open_source(path)
    return assemble(source, resolve_dtype(dtype, source.dtype), resolve_device(device))


def assemble(
    source: Source, dtype: torch.dtype, device: torch.device, rebuild: Rebuild | None = None
) -> "PreTrainedModel":
    """Build the model's structure without memory, then fill it tensor by tensor on the device.

    `rebuild` may exchange modules before anything is read. Experts are no modules: transformers holds those of a layer as
    one parameter, which is filled in the dtype.

    Raises:
        CameraError: if a tensor is missing, is misshapen, or holds NaN or infinity.
    """
    from transformers import AutoModelForCausalLM  # heavy; only computing needs it

    config = copy.deepcopy(source.config)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=source.family.attention
            )
    except Exception as error:  # nearly any type: a value that no layer can be built with
        raise CameraError(
            f"{source.path}: its config describes no model that transformers can build: {error!r}"
        ) from error
    model.eval().requires_grad_(False)
    names = _names_on_disk(source, model)
    joined = {**_experts(source), **(rebuild(model, names) if rebuild else {})}
    tied = dict(model.all_tied_weights_keys)
    empty = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_meta}
    for name, tensor in empty.items():
        if name not in tied:
            kept = dtype_in_model(model, name, tensor.dtype)
            parts = joined.get(name, {names.get(name, name): ()})
            _set_tensor(model, name, _filled(source, parts, tensor.shape, kept, device))
    for name, owner in tied.items():
        if name in empty:
            _set_tensor(model, name, model.get_parameter(owner))
    _compute_buffers(source, model, device)
    return model


def _names_on_disk(source: Source, model: "PreTrainedModel") -> dict[str, str]:
    """The source's names by those in transformers' model."""
    rename = names_in_model(model)
    return {rename(name): name for name in source.names}


def _experts(source: Source) -> dict[str, Joined]:
    """The parameters that hold all experts of a layer."""
    config = source.config.to_dict()
    found: dict[str, dict[str, tuple[int | slice, ...]]] = {}
    if source.family.experts is not None:
        for layer in range(source.config.num_hidden_layers):
            for name, place in source.family.fused(config, layer).items():
                found.setdefault(place.parameter, {})[name] = (place.expert, place.rows)
    return dict(found)


def _filled(
    source: Source, parts: Joined, shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """A parameter of one tensor or several; the host holds one of them at a time, of blocks some rows."""
    if len(parts) == 1 and _blocks(source, next(iter(parts))) is None:
        # On the CPU perhaps the file's own bytes, mapped.
        return _read(source, next(iter(parts)), shape).to(device, dtype)
    filled = torch.empty(shape, dtype=dtype, device=device)
    for name, place in parts.items():
        part, blocks = filled[place], _blocks(source, name)
        if blocks is None:
            part.copy_(_read(source, name, part.shape))
        else:
            _dequantize(source, name, blocks, part)
    return filled


def _blocks(source: Source, name: str) -> tuple[BlockType, np.ndarray] | None:
    """Type and bytes of a matrix that is stored as blocks known here."""
    if source.packed is None or name not in source.names:
        return None
    type, data = source.packed(name)
    return (type, data) if type in BLOCK_FORMATS and len(data) > 1 else None


def _dequantize(
    source: Source, name: str, blocks: tuple[BlockType, np.ndarray], filled_RC: torch.Tensor
) -> None:
    """Fill a matrix, some rows at a time."""
    type, data = blocks
    form, (rows, columns) = BLOCK_FORMATS[type], filled_RC.shape
    shape = [len(data), data.shape[1] // form.block_bytes * form.block_length]
    if shape != [rows, columns]:
        raise _misshapen(source, name, shape, filled_RC.shape)
    step = max(1, _NUMBERS_AT_ONCE // columns)
    for start in range(0, rows, step):
        part = data[start : start + step]
        numbers = torch.from_numpy(dequantize(part, type, columns))
        _check_finite(source, name, numbers)
        filled_RC[start : start + step].copy_(numbers)
        release_pages(part)


def _read(source: Source, name: str, shape: torch.Size) -> torch.Tensor:
    if name not in source.names:
        raise CameraError(f"{source.path} has no tensor {name}, and its config asks for it")
    tensor = source.read(name)
    if tensor.shape != shape:
        raise _misshapen(source, name, list(tensor.shape), shape)
    _check_finite(source, name, tensor)
    return tensor


def _misshapen(source: Source, name: str, found: list[int], asked: torch.Size) -> CameraError:
    return CameraError(f"{source.path}: {name} has shape {found} and its config asks for {list(asked)}")


def _check_finite(source: Source, name: str, tensor: torch.Tensor) -> None:
    # aminmax passes NaN and infinity on, and needs no memory of the tensor's size as isfinite does.
    if tensor.numel() and not all(map(torch.isfinite, tensor.aminmax())):
        raise CameraError(f"{source.path}: {name} holds NaN or infinity; the weights are damaged")


def _set_tensor(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Set a parameter or a buffer."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    if leaf in module._buffers or isinstance(value, nn.Parameter):
        setattr(module, leaf, value)
    else:
        setattr(module, leaf, nn.Parameter(value, requires_grad=False))


def _compute_buffers(source: Source, model: "PreTrainedModel", device: torch.device) -> None:
    """Make computed buffers, which on the meta device are empty: the number that an embedding multiplies by, and the modules
    that own rotary frequencies again."""
    embedding = model.get_input_embeddings()
    for name, module in list(model.named_modules()):
        empty = {key: buffer for key, buffer in module.named_buffers(recurse=False) if buffer.is_meta}
        if module is embedding:
            scale = source.family.scales.embedding(source.config.to_dict())
            for key, buffer in empty.items():
                setattr(module, key, torch.full(buffer.shape, scale, dtype=buffer.dtype, device=device))
        elif empty:
            model.set_submodule(name, type(module)(config=model.config).to(device))
