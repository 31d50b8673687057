"""What every tensor will be stored as: by the options, and for a number of bits by what rounding costs the model."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import translate
from math import prod

import torch

from camera.checkpoints.checkpoint import Checkpoint
from camera.errors import CameraError
from camera.formats.cann import why_slow, why_wrong
from camera.formats.quantized_model import packed_shape
from camera.models import named_weights
from camera.options import BlockType, QuantizeOptions
from camera.progress import Progress, silent
from camera.quantization.imatrix import Imatrix
from camera.quantization.sensitivity import sensitivities
from camera.registry import BLOCK_FORMATS

_WILD = re.compile(r"[*?\[]")


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
    finer type that holds them. Experts are q4_0_64 only if an override says so, and so is the output head only if it is asked
    for where llama.cpp would compute it wrongly; what it reads transposed is a float. A tied output head is not stored.

    Raises:
        CameraError: if an override matches no matrix, a tensor is neither vector nor matrix, or experts that a GGUF file
            holds in one tensor would be of several types.
    """
    plan = []
    weights = named_weights(checkpoint.family, checkpoint.config)
    overrides = _Overrides(options.overrides)
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
        overriding = overrides.type_of(name)
        given = overriding or asked_for(checkpoint, options, name)
        wanted = given or options.type
        if weight.block == "expert" and overriding is None and wanted in _MERGED_AS:
            planned = _readable_experts(name, info.shape, wanted)
        elif given is None and _is_multiplied(checkpoint, name) and (why := why_wrong(wanted, info.shape[0])):
            planned = replace(_fit(name, info.shape, BLOCK_FORMATS[wanted].fallback or wanted), fallback=why)
        else:
            planned = _fit(name, info.shape, wanted)
        if any(part.transposed for part in weight.parts):
            planned = _transposable(planned)
        plan.append(planned)
    if overrides.unused:
        raise CameraError(
            f"quantize.overrides: {min(overrides.unused)!r} matches no matrix of {checkpoint.folder}"
        )
    for group in merged(checkpoint, plan).values():
        if other := next((planned for planned in group if planned.type != group[0].type), None):
            raise CameraError(
                f"quantize.overrides: {group[0].name} is {group[0].type} and {other.name} is {other.type}, and a GGUF file "
                "holds the experts of a layer in one tensor of one type: let the pattern match all of them (experts.*)"
            )
    return plan


def concerns(checkpoint: Checkpoint, plan: Iterable[PlannedTensor]) -> list[str]:
    """What llama.cpp would not compute on an Ascend card, or wrongly, of a model that is for it; a sentence a matrix."""
    matrices = [
        planned for planned in plan if len(planned.shape) == 2 and _is_multiplied(checkpoint, planned.name)
    ]
    if not any(planned.type == "q4_0_64" for planned in matrices):
        return []
    found = []
    for planned in matrices:
        if (reason := why_wrong(planned.type, planned.shape[0])) is not None:
            found.append(
                f"{planned.name} is {planned.type}, which the GGUF holds as q4_0 of the same numbers: {reason}"
            )
        elif (reason := why_slow(planned.type)) is not None:
            found.append(f"{planned.name} is {planned.type}: {reason}")
    return found


def notable_types(checkpoint: Checkpoint, options: QuantizeOptions) -> list[str]:
    """What a person should know of `plan_types` before a run: matrices of another type than the rest for an Ascend card's
    sake, and what `concerns` finds."""
    plan = plan_types(checkpoint, options)
    exchanged = [
        f"{planned.name} is {planned.type}: {planned.fallback}"
        for planned in plan
        if planned.fallback and planned.fallback == why_wrong(options.type, planned.shape[0])
    ]
    return exchanged + concerns(checkpoint, plan)


def _is_multiplied(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a matrix is multiplied: of an embedding that is not the output head too, single rows are read."""
    return name != checkpoint.embedding or checkpoint.tied


class _Overrides:
    """Types by pattern; of thousands of names, those that are no patterns are not tried one by one."""

    def __init__(self, overrides: Mapping[str, BlockType]) -> None:
        self.unused = set(overrides)
        self._types = tuple(overrides.items())
        self._names = {name: at for at, name in enumerate(overrides) if not _WILD.search(name)}
        self._patterns = [
            (re.compile(translate(pattern)), at)
            for at, pattern in enumerate(overrides)
            if pattern not in self._names
        ]

    def type_of(self, name: str) -> BlockType | None:
        """What the last that matches a name says."""
        matching = [at for pattern, at in self._patterns if pattern.match(name)]
        if name in self._names:
            matching.append(self._names[name])
        self.unused -= {self._types[at][0] for at in matching}
        return self._types[max(matching)][1] if matching else None


def merged(checkpoint: Checkpoint, plan: Iterable[PlannedTensor]) -> dict[str, list[PlannedTensor]]:
    """The tensors of a plan that share a type, in order: those of all experts of a layer by their name in a GGUF file, and
    every other by itself, under its own name."""
    weights = named_weights(checkpoint.family, checkpoint.config)
    found: dict[str, list[PlannedTensor]] = {}
    for planned in plan:
        placed = weights[planned.name]
        found.setdefault(planned.name if placed.expert is None else placed.gguf, []).append(planned)
    return found


def asked_for(checkpoint: Checkpoint, options: QuantizeOptions, name: str) -> str | None:
    """The type that the options give for the embedding or the output head by itself."""
    if name == checkpoint.embedding:
        return options.embedding_type
    return options.output_type if name == checkpoint.head else None


def choose_types(
    checkpoint: Checkpoint, options: QuantizeOptions, imatrix: Imatrix, progress: Progress = silent
) -> QuantizeOptions:
    """The options with an override for each matrix that gets a finer type, at `target_bpw` bits per weight or just below.

    The experts of a layer get one type for their gates, one for their ups and one for their downs: a GGUF file holds them so.
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
    groups = merged(checkpoint, plan_types(checkpoint, options))
    overrides = _Overrides(options.overrides)
    steps = {group: _choices(planned[0], checkpoint, options, overrides) for group, planned in groups.items()}
    shapes = {group: planned[0].shape for group, planned in groups.items()}
    bits = {
        group: {type: 8 * len(groups[group]) * prod(packed_shape(type, shapes[group])) for type in types}
        for group, types in steps.items()
    }
    parameters = sum(len(planned) * prod(shapes[group]) for group, planned in groups.items())
    lowest = sum(min(sizes.values()) for sizes in bits.values()) / parameters
    highest = sum(max(sizes.values()) for sizes in bits.values()) / parameters
    if not lowest <= options.target_bpw <= highest:
        raise CameraError(
            f"quantize.target_bpw: {options.target_bpw:g} bits per weight cannot be reached in {checkpoint.folder} "
            f"from type {options.type}: {_up(lowest)} to {_down(highest)} can"
        )
    free = {
        planned.name: types for group, types in steps.items() if len(types) > 1 for planned in groups[group]
    }
    noise = sensitivities(checkpoint, imatrix, free, progress)
    group_noise = {
        group: {type: sum(noise[planned.name][type] for planned in groups[group]) for type in types}
        for group, types in steps.items()
        if len(types) > 1
    }
    chosen = spend(bits, group_noise, options.target_bpw * parameters)
    finer = {
        planned.name: type
        for group, type in chosen.items()
        if type != steps[group][0]
        for planned in groups[group]
    }
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


def _choices(
    planned: PlannedTensor, checkpoint: Checkpoint, options: QuantizeOptions, overrides: _Overrides
) -> tuple[str, ...]:
    """The types that a tensor may get, the smallest first; one where it was asked for or nothing finer holds the rows."""
    given = asked_for(checkpoint, options, planned.name) or overrides.type_of(planned.name)
    if given is not None or len(planned.shape) == 1 or not BLOCK_FORMATS[planned.type].in_mixtures:
        return (planned.type,)
    # bf16 keeps such weights exactly.
    exact = checkpoint.dtype == torch.bfloat16 and options.type != "q4_0_64"  # which is for Ascend cards
    finest = "bf16" if exact else "f16"
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
