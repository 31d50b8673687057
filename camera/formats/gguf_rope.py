"""Rotary position parameters of a GGUF file, as config.json writes them."""

from collections.abc import Iterable
from math import isfinite
from typing import Any

import numpy as np

from camera.errors import CameraError
from camera.formats.gguf_file import GgufFile
from camera.formats.rope import (
    ATTENTION_FACTOR,
    DEFAULT_THETA,
    LONG,
    LONG_FACTORS,
    PARAMETERS_KEY,
    ROPE_FACTORS,
    SCALED,
    YARN,
    llama3_factors,
    stated_parameters,
    usual_attention_factor,
)

_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What every published model with Llama 3's factors has; `factor` differs (8, 16, 32)."""
_CLOSE = 1e-3
"""Factors are computed in float32 by others, which moves those in the smooth range by some 1e-5."""


def read_rope(file: GgufFile, turned: int) -> dict[str, Any]:
    """`rope_theta`, and `rope_scaling` where there is any.

    Args:
        file: the file.
        turned: dimensions of a head that its position turns.

    Raises:
        CameraError: if config.json has no words for what the file states, or it is damaged.
    """
    prefix = f"{file.architecture}.rope."
    theta = file.value(f"{prefix}freq_base", float, DEFAULT_THETA)
    factors = file.tensors.keys() & {ROPE_FACTORS, *LONG_FACTORS.values()}
    if factors and PARAMETERS_KEY in file.metadata:
        return stated_parameters(file.value(PARAMETERS_KEY, str), str(file.path))
    kind = file.value(f"{prefix}scaling.type", str, "none")
    if factors:
        llama3 = ROPE_FACTORS in factors
        if kind not in ("none", "none" if llama3 else LONG) or (llama3 and len(factors) > 1):
            raise _unclear(file, factors, f"stand beside the rope scaling {kind!r} or one another")
        scaling = _llama3(file, theta, turned) if llama3 else _long(file, turned)
    else:
        scaling = _scaling(file, kind)
    return {"rope_theta": theta, "rope_scaling": scaling} if scaling else {"rope_theta": theta}


def _scaling(file: GgufFile, kind: str) -> dict[str, Any]:
    """What keys alone state."""
    prefix = f"{file.architecture}.rope.scaling."
    if kind == "none":
        return {}
    if kind not in SCALED:
        raise CameraError(
            f"{file.path}: rope scaling {kind!r} is not supported; supported are {', '.join(SCALED)}"
        )
    factor = file.value(f"{prefix}factor", float)
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if (key := f"{prefix}original_context_length") in file.metadata:
        scaling["original_max_position_embeddings"] = file.value(key, int)
    for name, stored in YARN.items():
        if (key := f"{prefix}{stored}") in file.metadata:
            scaling[name] = file.value(key, float)
    if kind == "yarn" and (key := f"{prefix}attn_factor") in file.metadata:
        scaling[ATTENTION_FACTOR] = round(file.value(key, float) * usual_attention_factor(factor), 6)
    if (key := f"{prefix}yarn_log_multiplier") in file.metadata:
        scaling["mscale"] = scaling["mscale_all_dim"] = round(10 * file.value(key, float), 6)
    return scaling


def _llama3(file: GgufFile, theta: float, turned: int) -> dict[str, Any]:
    """From what Llama 3's factors were computed; the longest wave is divided by `factor` itself."""
    found = _factors(file, ROPE_FACTORS, turned)
    scaling = {"rope_type": "llama3", "factor": max(found), **_LLAMA3}
    with np.errstate(all="ignore"):  # of a damaged file
        computed = llama3_factors({**scaling, "rope_theta": theta}, turned)
    if not np.allclose(found, computed, rtol=_CLOSE, atol=0):
        stated = ", ".join(f"{key} {value:g}" for key, value in _LLAMA3.items())
        raise _unclear(file, {ROPE_FACTORS}, f"are not those of Llama 3 ({stated})")
    return {} if scaling["factor"] == 1 else scaling


def _long(file: GgufFile, turned: int) -> dict[str, Any]:
    """LongRoPE, of whose numbers a file lacks none."""
    prefix = f"{file.architecture}."
    length = file.value(f"{prefix}context_length", int)
    scale = file.value(f"{prefix}rope.scaling.attn_factor", float, 1.0)
    return {
        "rope_type": LONG,
        **{key: _factors(file, name, turned) for key, name in LONG_FACTORS.items()},
        "original_max_position_embeddings": file.value(
            f"{prefix}rope.scaling.original_context_length", int, length
        ),
        "short_mscale": scale,
        "long_mscale": scale,
    }


def _factors(file: GgufFile, name: str, turned: int) -> list[float]:
    """The factors of a tensor, each the shortest decimal that its float32 stands for."""
    found = [float(str(factor)) for factor in file.dequantize(name).flatten().numpy()]
    if not found or 2 * len(found) != turned or not all(isfinite(factor) and factor > 0 for factor in found):
        raise CameraError(
            f"{file.path}: {name} does not hold one factor above zero for each of {turned // 2} turned pairs: the file is "
            "damaged, fetch or write it again"
        )
    return found


def _unclear(file: GgufFile, names: Iterable[str], what: str) -> CameraError:
    return CameraError(
        f"{file.path}: the rotary factors of {', '.join(sorted(names))} {what}, and no key {PARAMETERS_KEY} says from what "
        "they were computed: take the Hugging Face folder that the file was made from"
    )
