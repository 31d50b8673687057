"""What a build of llama.cpp does on a device, asked of the build itself with a tiny model: its backends, GRAPH or EAGER, and
whether it reads Q4_0_64.

Log-probabilities of the tiny file and of its Q4_0 twin are compared with those that the weights have. `llama-perplexity`
writes them to a file, one token at a time, as in decoding; `llama-bench` prints none, and loads such a file or does not.
"""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import platformdirs
import torch

from camera.digests import digest_json
from camera.engines.parts.llama_build import LlamaBuild, run
from camera.errors import CameraError
from camera.files import write_json
from camera.options import QuantizeOptions
from camera.results import Result

log = logging.getLogger(__name__)

PERPLEXITY = "llama-perplexity"
_SIZES = {"layers": 2, "hidden": 256, "ffn": 512, "vocab": 320, "heads": 4, "kv_heads": 2, "positions": 512}
"""Several blocks to a row, and rows that every kernel for groups of 64 takes."""
_WINDOW = 32
"""Tokens; the log-probabilities after the second half of them are written."""
_TEXT = "Seven wizards quickly jump over the lazy brown fox, then box in a hazy park at midnight. " * 2
RIGHT_KL = 0.01
"""Nats. Rounded activations cost 0.00005 on a CPU, and a single matrix whose halves of blocks change places 0.13."""
_SECONDS = 300
"""For one question; a card compiles kernels at the first."""
_BACKENDS = {"npu": ("CANN",), "cuda": ("CUDA", "ROCM", "HIP")}
_MODE = re.compile(r"execution mode is (\w+)")


@dataclass(frozen=True)
class Probe:
    """What a build says of itself while it runs."""

    backends: str
    """As llama-bench names them, with commas between."""
    gpu_info: str | None
    """The accelerators that it found, empty if none; None if it does not say."""
    execution_mode: str | None
    """On a backend that has two: GRAPH, or EAGER."""

    def why_not_on(self, kind: str) -> str | None:
        """Why a time of this build would not be one of an accelerator, `npu` or `cuda`; None if it is."""
        if kind not in _BACKENDS:
            return None
        if not any(name in self.backends.upper() for name in _BACKENDS[kind]):
            return f"its backends are {self.backends or 'none'}, without {_BACKENDS[kind][0]}: the CPU would be timed"
        if self.gpu_info == "":
            return f"its backends are {self.backends}, and it finds no card: the CPU would be timed"
        return None


class Reading(Result):
    """Whether a build computes from a Q4_0_64 file what its weights say."""

    reads: bool | None
    """None where it could not be asked."""
    why_not: str | None = None


def layer_flags(device: torch.device) -> tuple[str, ...]:
    """Where llama.cpp computes the layers: on the CPU, or on this card alone."""
    if device.type == "cpu":
        return ("-ngl", "0")
    return ("-ngl", "99", "-sm", "none", "-mg", str(device.index or 0))


def probe_build(build: LlamaBuild, device: torch.device) -> Probe:
    """Run a tiny Q4_0 model on a device, and see.

    Raises:
        CameraError: if it does not run it.
    """
    flags = layer_flags(device)
    with TemporaryDirectory(prefix="camera-probe-") as scratch:
        _, twin = write_tiny(Path(scratch))
        try:
            return _bench(build, flags, twin)
        except CameraError:
            # A build without cards refuses to choose one, and says without that choice where it computes.
            probe = _bench(build, flags[:2], twin)
            if probe.why_not_on(device.type) is None:
                raise
            return probe


def read_probe(test: Mapping[str, Any], errors: str = "") -> Probe:
    """What an entry of llama-bench's JSON says, and standard error."""
    backends = str(test["backends"])
    found = _MODE.findall(errors)
    # A CANN backend that is built without graphs says nothing.
    mode = found[-1] if found else "EAGER" if "CANN" in backends.upper() else None
    return Probe(backends, test.get("gpu_info"), mode)


def ask_reading(build: LlamaBuild, layers: Sequence[str], card: Mapping[str, str | None]) -> Reading:
    """Ask a build whether it reads Q4_0_64, or take a yes that the same build gave before for the same device, under the same
    GGML_* variables.

    Args:
        build: the build.
        layers: `layer_flags`; a backend reads types by itself, so it is asked on the device.
        card: its name, and the versions below llama.cpp.
    """
    asked = [build.digest(), list(layers), dict(card), backend_settings()]
    kept = platformdirs.user_cache_path("camera-npu") / f"llama-cpp-{digest_json(asked)[:16]}.json"
    if kept.is_file():
        return Reading.read(kept, "remove it")
    try:
        with TemporaryDirectory(prefix="camera-probe-") as scratch:
            reading = _reading(build, layers, Path(scratch))
    except CameraError as error:
        return Reading(reads=None, why_not=str(error))
    if reading.reads:  # a no may be a crash that will be mended
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_json(kept, reading.model_dump(mode="json"))
        except OSError as error:
            log.warning("%s cannot be written, so that every run asks again: %s", kept, error)
    return reading


def backend_settings() -> dict[str, str]:
    """The variables that llama.cpp's backends read, GGML_CANN_* among them."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith("GGML_")}


def _reading(build: LlamaBuild, layers: Sequence[str], scratch: Path) -> Reading:
    """Ask; raises CameraError if the Q4_0 twin cannot be run either."""
    file, twin = write_tiny(scratch)
    _bench(build, layers, twin)
    try:
        _bench(build, layers, file)
    except CameraError as error:
        return Reading(reads=False, why_not=str(error))
    program = build.beside(PERPLEXITY)
    if program is None:
        return Reading(reads=None, why_not=f"{build.name} has no {PERPLEXITY} beside it to ask for logits")
    if (distance := distance_of(program, layers, twin)) > RIGHT_KL:
        return Reading(reads=None, why_not=f"{build.name} computes Q4_0 wrongly, {distance:.2g} nats off")
    try:
        distance = distance_of(program, layers, file)
    except CameraError as error:
        return Reading(reads=False, why_not=str(error))
    if distance > RIGHT_KL:
        return Reading(reads=False, why_not=f"{build.name} computes Q4_0_64 wrongly, {distance:.2g} nats off")
    return Reading(reads=True)


def _bench(build: LlamaBuild, layers: Sequence[str], model: Path) -> Probe:
    """Decode two tokens of a tiny model; raises CameraError if that fails."""
    command = [*build.command, "-m", str(model), "-p", "4", "-n", "2", "-r", "1", "-o", "json", "-v", *layers]
    done = run(command, f"{build.name} on {model.name}", _SECONDS)
    return read_probe(build.tests(done.output)[0], done.errors)


def write_tiny(folder: Path) -> tuple[Path, Path]:
    """A tiny Q4_0_64 file of random weights, and its Q4_0 twin."""
    # Tokenizers and quantising take time to import, and engines are imported to know their names.
    from camera.checkpoints.checkpoint import Checkpoint
    from camera.checkpoints.synthetic import write_checkpoint
    from camera.formats.convert import convert_to_gguf, write_twin
    from camera.quantization.execute import quantize_checkpoint

    source = write_checkpoint(folder / "model", **_SIZES, dtype=torch.float32)
    quantize_checkpoint(
        Checkpoint.open(source), folder / "packed", QuantizeOptions(type="q4_0_64", device="cpu")
    )
    file, twin = folder / "tiny.gguf", folder / "twin.gguf"
    convert_to_gguf(folder / "packed", file, name="tiny")
    write_twin(file, twin)
    return file, twin


def _log_probabilities(program: str, layers: Sequence[str], model: Path) -> tuple[list[int], np.ndarray]:
    """A window of tokens, and float32 [tokens, vocabulary] of what comes after those of its second half but the last."""
    text, out = model.with_name("text.txt"), model.with_suffix(".logits")
    text.write_text(_TEXT)
    command = [program, "-m", str(model), "-f", str(text), "-c", str(_WINDOW), "-b", "1", "--chunks", "1"]
    command += ["--kl-divergence-base", str(out), *layers]
    run(command, f"{program} on a tiny model", _SECONDS)
    try:
        return read_log_probabilities(out.read_bytes())
    except (OSError, ValueError) as error:
        raise CameraError(f"{program} wrote no log-probabilities: {error}") from None


def read_log_probabilities(content: bytes) -> tuple[list[int], np.ndarray]:
    """The first window of a file of llama-perplexity's `--kl-divergence-base`.

    It holds `_logits_`, three int32 (window, vocabulary, windows), the tokens in int32; then a row for each token of a window's
    second half but the last: two float32 (step and lowest value), and codes of uint16, an even number.

    Raises:
        ValueError: if it is none, or ends early.
    """
    if content[:8] != b"_logits_":
        raise ValueError("it starts with something else")
    window, vocabulary, windows = np.frombuffer(content, np.int32, 3, offset=8).tolist()
    tokens = np.frombuffer(content, np.int32, window, offset=20).tolist()
    row = np.dtype(
        [("step", np.float32), ("lowest", np.float32), ("codes", np.uint16, (vocabulary + vocabulary % 2,))]
    )
    rows = np.frombuffer(content, row, window - 1 - window // 2, offset=20 + 4 * window * windows)
    codes_TV = rows["codes"][:, :vocabulary].astype(np.float32)
    return tokens, rows["lowest"][:, None] + rows["step"][:, None] * codes_TV


def _expected(path: Path, tokens: list[int]) -> np.ndarray:
    """The log-probabilities that a file's weights have, of the same shape."""
    from camera.loading import load_model  # brings transformers, which takes seconds

    with torch.inference_mode():
        logits_TV = load_model(path, dtype="float32", device="cpu")(torch.tensor([tokens])).logits[0]
    half = len(tokens) // 2
    found: np.ndarray = logits_TV[half:-1].log_softmax(-1).numpy()
    return found


def distance_of(program: str, layers: Sequence[str], model: Path) -> float:
    """Mean KL divergence in nats from what a file's weights say; infinite if what was found is not finite."""
    tokens, found_TV = _log_probabilities(program, layers, model)
    expected_TV = _expected(model, tokens)
    if expected_TV.shape != found_TV.shape or not np.isfinite(found_TV).all():
        return float("inf")
    return float((np.exp(expected_TV) * (expected_TV - found_TV)).sum(axis=1).mean())
