"""Rotary position parameters, between config.json and GGUF."""

import json
from math import log, pi
from typing import Any

import gguf
import numpy as np

from camera.errors import CameraError
from camera.files import parse_json

ROPE_FACTORS = "rope_freqs.weight"
"""The tensor that holds Llama 3's factors, one for each rotated pair."""
PARAMETERS_KEY = "camera.rope_parameters"
"""JSON text of the parameters from which those factors were computed; the factors alone do not give them back."""
DEFAULT_THETA = 10000.0
SCALED = ("linear", "yarn")
LONG = "longrope"
LONG_FACTORS = {"long_factor": "rope_factors_long.weight", "short_factor": "rope_factors_short.weight"}
"""The tensors that hold the divisors of LongRoPE for contexts above and below the original length."""
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
YARN = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}
"""Numbers of YaRN that both know, with the names below `rope.scaling` of a file."""
_RAMP = {"beta_fast": 32.0, "beta_slow": 1.0}
"""With which llama.cpp computes them whatever a file says, but for two architectures that no family here has."""
_MSCALE = ("mscale", "mscale_all_dim")
ATTENTION_FACTOR = "attention_factor"
"""By what YaRN multiplies sines and cosines, where it is not 0.1 ln(factor) + 1."""
_KNOWN = {
    ATTENTION_FACTOR,
    *(
        "rope_type",
        "type",
        "rope_theta",
        "factor",
        "original_max_position_embeddings",
        "partial_rotary_factor",
    ),
    *("alpha", "short_mscale", "long_mscale"),
    *(*_LLAMA3, *YARN, *_MSCALE, *LONG_FACTORS),
}


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a config.json, whichever way it writes them: always with `rope_type` and `rope_theta`.

    Raises:
        CameraError: if they hold something that cannot be carried over.
    """
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    parameters = {key: value for key, value in given.items() if value is not None}
    theta = parameters.pop("rope_theta", config.get("rope_theta", DEFAULT_THETA))
    kind = parameters.pop("rope_type", parameters.pop("type", "default"))
    parameters.pop("type", None)
    if kind == "dynamic" and parameters.get("alpha"):  # another name of a larger base, whatever the length
        kind = "ntk"
    known = _KNOWN | {"truncate"} if kind == "yarn" else _KNOWN - {ATTENTION_FACTOR}
    if kind not in ("default", "llama3", "ntk", LONG, *SCALED) or parameters.keys() - known:
        raise CameraError(
            f"config.json: rope parameters {given} are not supported in GGUF; supported are the types "
            f"default, {', '.join(SCALED)}, {LONG}, dynamic with alpha, and llama3 with {', '.join(_LLAMA3)}"
        )
    if kind == "yarn":
        if not parameters.pop("truncate", True):
            raise CameraError(
                f"config.json: rope parameters {given} do not round the range of YaRN's ramp, and llama.cpp does"
            )
        for name, computed in _RAMP.items():
            if parameters.get(name, computed) != computed:
                raise CameraError(
                    f"config.json: rope parameters {given} have another {name} than {computed}, and llama.cpp reads none: it "
                    "would compute other positions"
                )
        if not parameters.get("mscale_all_dim"):  # transformers uses both or none
            parameters.pop("mscale", None)
    if kind == "yarn" and (
        parameters.get("mscale", 0) != parameters.get("mscale_all_dim", 0)
        or (ATTENTION_FACTOR in parameters and parameters.get("mscale_all_dim"))
    ):
        raise CameraError(
            f"config.json: rope parameters {given} have an mscale that is not mscale_all_dim, or attention_factor "
            "beside it, which GGUF cannot say"
        )
    if kind == LONG and parameters.get("short_mscale") != parameters.get("long_mscale"):
        raise CameraError(
            f"config.json: rope parameters {given} have a long_mscale that is not short_mscale, which GGUF cannot say"
        )
    return {"rope_type": kind, "rope_theta": float(theta), **parameters}


def write_rope(writer: gguf.GGUFWriter, config: dict[str, Any], turned: int) -> dict[str, np.ndarray]:
    """Add the rotary keys to a file.

    Args:
        writer: of the file.
        config: of the model.
        turned: dimensions of a head that its position turns.

    Returns:
        tensors to be written, by name: for Llama 3's scaling and LongRoPE factors, float32 [turned / 2].

    Raises:
        CameraError: if the config's parameters cannot be carried over.
    """
    parameters = rope_parameters(config)
    kind = parameters["rope_type"]
    theta = parameters["rope_theta"]
    if kind == "ntk":
        theta *= float(parameters["alpha"]) ** (turned / (turned - 2))
    writer.add_rope_dimension_count(turned)
    writer.add_rope_freq_base(theta)
    try:
        if kind in SCALED:
            writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
            writer.add_rope_scaling_factor(float(parameters["factor"]))
            if "original_max_position_embeddings" in parameters:
                writer.add_rope_scaling_orig_ctx_len(int(parameters["original_max_position_embeddings"]))
            for key, name in YARN.items():
                if key in parameters:
                    writer.add_float32(f"{writer.arch}.rope.scaling.{name}", float(parameters[key]))
            if ATTENTION_FACTOR in parameters:  # a file states it over the usual one
                writer.add_rope_scaling_attn_factors(
                    float(parameters[ATTENTION_FACTOR]) / usual_attention_factor(float(parameters["factor"]))
                )
            if parameters.get("mscale_all_dim"):
                writer.add_rope_scaling_yarn_log_mul(0.1 * float(parameters["mscale_all_dim"]))
        elif kind == "llama3":
            writer.add_string(PARAMETERS_KEY, json.dumps(parameters, sort_keys=True))
            return {ROPE_FACTORS: llama3_factors(parameters, turned)}
        elif kind == LONG:
            return _write_long(writer, parameters)
    except KeyError as error:
        raise CameraError(f"config.json: rope type {kind} needs {error.args[0]}") from None
    return {}


def usual_attention_factor(factor: float) -> float:
    """YaRN's factor of sines and cosines for a context that is so many times longer."""
    return 0.1 * log(factor) + 1 if factor > 1 else 1.0


def _write_long(writer: gguf.GGUFWriter, parameters: dict[str, Any]) -> dict[str, np.ndarray]:
    writer.add_string(PARAMETERS_KEY, json.dumps(parameters, sort_keys=True))
    writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
    writer.add_rope_scaling_orig_ctx_len(int(parameters["original_max_position_embeddings"]))
    writer.add_rope_scaling_attn_factors(float(parameters["short_mscale"]))
    return {name: np.array(parameters[key], np.float32) for key, name in LONG_FACTORS.items()}


def stated_parameters(text: str, where: str) -> dict[str, Any]:
    """The keys of config.json for the parameters that a file states beside its factors.

    Raises:
        CameraError: if they cannot be understood.
    """
    try:
        parameters = rope_parameters({"rope_scaling": parse_json(text)})
    except (ValueError, TypeError, AttributeError):
        raise CameraError(
            f"{where}: {PARAMETERS_KEY} is not readable: convert the checkpoint again"
        ) from None
    return {"rope_theta": parameters.pop("rope_theta"), "rope_scaling": parameters}


def llama3_factors(parameters: dict[str, Any], head_dim: int) -> np.ndarray:
    """By what each pair's frequency is divided: 1 for short waves, `factor` for long ones, smooth between.

    Source: Llama 3.1; the same function in transformers' `modeling_rope_utils` computes frequencies with it.
    """
    factor, low, high = (float(parameters[key]) for key in _LLAMA3[:3])
    length = float(parameters[_LLAMA3[3]])
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    waves = 2 * pi * parameters["rope_theta"] ** exponents
    smooth = np.clip((length / waves - low) / (high - low), 0, 1)
    factors: np.ndarray = (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
    return factors


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Each head's rows from (first half, second half) to pairs, as llama.cpp rotates them. [rows, ...]"""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def split_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `interleave`."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
