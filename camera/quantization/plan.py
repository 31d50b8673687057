"""What every tensor will be stored as: by the options, and for a number of bits by what rounding costs the model."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from math import prod

import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.errors import CameraError
from camera.formats.quantized_model import packed_shape
from camera.models import named_weights
from camera.options import QuantizeOptions
from camera.progress import Progress, silent
from camera.quantization.imatrix import Imatrix
from camera.quantization.sensitivity import sensitivities
from camera.registry import BLOCK_FORMATS


@dataclass(frozen=True)
class PlannedTensor:
    """What a tensor will be stored as."""

    name: str
    shape: tuple[int, ...]
    type: str
    fallback: str | None
    """Why it is not of the type asked for; None if it is."""


def plan_types(checkpoint: Checkpoint, options: QuantizeOptions) -> list[PlannedTensor]:
    """What every tensor will be stored as, in the checkpoint's order.

    Vectors, routers and gates stay f32. A matrix is what the last matching override says, else what the options say for the
    embedding and the output head, else `options.type`; where its rows are no multiple of the block, the next
    finer type that holds them. Experts are q4_0_64 only if an override says so, and what llama.cpp reads transposed
    is a float. A tied output head is not stored.

    Raises:
        CameraError: if an override matches no matrix, or a tensor is neither vector nor matrix.
    """
    plan = []
    weights = named_weights(checkpoint.family, checkpoint.config)
    unused = set(options.overrides)
    for name, info in checkpoint.needed.items():
        if checkpoint.tied and name == checkpoint.family.name("head"):
            continue
        if len(info.shape) not in (1, 2):
            raise CameraError(
                f"{checkpoint.folder}: {name} has shape {list(info.shape)}: only vectors and matrices are stored"
            )
        weight = weights[name].weight
        if len(info.shape) == 1 or weight.exact:
            plan.append(PlannedTensor(name, info.shape, "f32", None))
            continue
        overriding = [pattern for pattern in options.overrides if fnmatch(name, pattern)]
        unused -= set(overriding)
        if overriding:
            wanted = options.overrides[overriding[-1]]
        else:
            wanted = asked_for(checkpoint, options, name) or options.type
        if weight.block == "expert" and not overriding and wanted in _MERGED_AS:
            planned = _readable_experts(name, info.shape, wanted)
        else:
            planned = _fit(name, info.shape, wanted)
        if any(part.transposed for part in weight.parts):
            planned = _transposable(planned)
        plan.append(planned)
    if unused:
        raise CameraError(f"quantize.overrides: {min(unused)!r} matches no matrix of {checkpoint.folder}")
    return plan


def asked_for(checkpoint: Checkpoint, options: QuantizeOptions, name: str) -> str | None:
    """The type that the options give for the embedding or the output head by itself."""
    if name == checkpoint.embedding:
        return options.embedding_type
    return options.output_type if name == checkpoint.head else None


def choose_types(
    checkpoint: Checkpoint, options: QuantizeOptions, imatrix: Imatrix, progress: Progress = silent
) -> QuantizeOptions:
    """The options with an override for each matrix that gets a finer type, at `target_bpw` bits per weight or just below.

    Overrides, `output_type` and `embedding_type` that are given stay as they are and count.

    Args:
        checkpoint: the model.
        options: with a `target_bpw`.
        imatrix: second moments of the inputs on the calibration tokens.
        progress: called with (matrices measured, all).

    Raises:
        CameraError: if no choice of types comes to that many bits, with the range that is possible.
    """
    assert options.target_bpw is not None
    plan = plan_types(checkpoint, options)
    steps = {planned.name: _choices(planned, checkpoint, options) for planned in plan}
    shapes = {planned.name: planned.shape for planned in plan}
    bits = {
        name: {type: 8 * prod(packed_shape(type, shapes[name])) for type in types}
        for name, types in steps.items()
    }
    parameters = sum(prod(shape) for shape in shapes.values())
    lowest = sum(min(sizes.values()) for sizes in bits.values()) / parameters
    highest = sum(max(sizes.values()) for sizes in bits.values()) / parameters
    if not lowest <= options.target_bpw <= highest:
        raise CameraError(
            f"quantize.target_bpw: {options.target_bpw:g} bits per weight cannot be reached in {checkpoint.folder} "
            f"from type {options.type}: {_up(lowest)} to {_down(highest)} can"
        )
    free = {name: types for name, types in steps.items() if len(types) > 1}
    noise = sensitivities(checkpoint, imatrix, free, progress)
    chosen = spend(bits, noise, options.target_bpw * parameters)
    finer = {name: type for name, type in chosen.items() if type != steps[name][0]}
    return options.model_copy(update={"overrides": {**finer, **options.overrides}})


def spend(
    bits: Mapping[str, Mapping[str, int]], noise: Mapping[str, Mapping[str, float]], budget: float
) -> dict[str, str]:
    """Choose a type for every tensor: repeatedly the step that saves the most noise per bit, while one fits.

    Args:
        bits: of each tensor what each of its types takes, the smallest first; together those fit.
        noise: what each type costs, of the tensors that have a choice.
        budget: bits for all.
    """
    chosen = {name: next(iter(sizes)) for name, sizes in bits.items()}
    left = budget - sum(bits[name][type] for name, type in chosen.items())
    while True:
        best: tuple[float, str, str] | None = None
        for name, costs in noise.items():
            size, cost = bits[name][chosen[name]], costs[chosen[name]]
            for type, next_cost in costs.items():
                more = bits[name][type] - size
                if 0 < more <= left and next_cost < cost:
                    worth = (cost - next_cost) / more
                    if best is None or worth > best[0]:
                        best = worth, name, type
        if best is None:
            return chosen
        _, name, type = best
        left -= bits[name][type] - bits[name][chosen[name]]
        chosen[name] = type


def _choices(planned: PlannedTensor, checkpoint: Checkpoint, options: QuantizeOptions) -> tuple[str, ...]:
    """The types that a tensor may get, the smallest first; one where it was asked for or nothing finer holds the rows."""
    given = asked_for(checkpoint, options, planned.name) is not None or any(
        fnmatch(planned.name, pattern) for pattern in options.overrides
    )
    if given or len(planned.shape) == 1 or not BLOCK_FORMATS[planned.type].in_mixtures:
        return (planned.type,)
    finest: str = "bf16" if checkpoint.dtype == torch.bfloat16 else "f16"  # bf16 keeps those weights exactly
    bits = BLOCK_FORMATS[planned.type].bits_per_weight
    mixed = [form for form in BLOCK_FORMATS.values() if form.in_mixtures and form.bits_per_weight >= bits]
    mixed.sort(key=lambda form: form.bits_per_weight)
    finer = (*mixed, BLOCK_FORMATS[finest])
    return tuple(form.name for form in finer if planned.shape[1] % form.block_length == 0)


def _up(number: float) -> str:
    """Rounded up to three decimals, so that a target of this text is possible."""
    return f"{-(-number * 1000 // 1) / 1000:.3f}"


def _down(number: float) -> str:
    return f"{number * 1000 // 1 / 1000:.3f}"


_MERGED_AS = {"q4_0_64": "q4_0"}
"""What experts are in place of a type that the llama.cpp made for it reads wrongly in tensors of several matrices."""


def _readable_experts(name: str, shape: tuple[int, ...], wanted: str) -> PlannedTensor:
    planned = _fit(name, shape, _MERGED_AS[wanted])
    reason = (
        f"the NPU code of llama.cpp for {wanted} converts the first expert of a tensor only, and the others become zeros: "
        "name them in an override to have it all the same"
    )
    return planned if planned.fallback else replace(planned, fallback=reason)


def _transposable(planned: PlannedTensor) -> PlannedTensor:
    if BLOCK_FORMATS[planned.type].block_length == 1:
        return planned
    reason = "llama.cpp reads a part of it transposed, which blocks of a row cannot be"
    return replace(planned, type="f16", fallback=reason)


def _fit(name: str, shape: tuple[int, ...], wanted: str) -> PlannedTensor:
    form = BLOCK_FORMATS[wanted]
    while shape[-1] % form.block_length:
        form = BLOCK_FORMATS[form.fallback or "f32"]
    if form.name == wanted:
        return PlannedTensor(name, shape, wanted, None)
    length = BLOCK_FORMATS[wanted].block_length
    return PlannedTensor(
        name, shape, form.name, f"rows of {shape[-1]} weights are no multiple of {wanted}'s block of {length}"
    )
