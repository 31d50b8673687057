"""Models run by llama.cpp: a `llama-bench` of the user's, or the build in the extra `llama`. One process for each turn."""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any, Self

import numpy as np
import psutil

from camera.digests import digest_file, digest_json
from camera.engines import ENGINES, Engine, Footprint, Timing
from camera.engines.parts import xllama
from camera.errors import CameraError
from camera.formats.convert import write_twin
from camera.formats.gguf_parser import TWIN_KEY
from camera.formats.gguf_reader import (
    GgufFile,
    cached_numbers,
    hf_config,
    hf_names,
    is_q4_0_64,
    open_gguf,
)
from camera.formats.types.q4_0_64 import Q4_0_64
from camera.models import family_of
from camera.options import BenchmarkOptions, Options, PositiveInt, Setting

if TYPE_CHECKING:
    import torch

BINARY = "llama-bench"
_BELOW = (".", "bin", "build/bin")
"""Where in a folder the binary lies: beside the user's files, in an install, or in a source tree."""
_BUILD_KEYS = (
    *("build_commit", "build_number", "backends", "cpu_info", "system_info", "gpu_info"),
    *("n_threads", "n_gpu_layers", "model_type"),
)
_POLL_S = 0.2
_WHEEL = "xllamacpp"
"""The package of the extra `llama`."""


class LlamaCppOptions(Options):
    """Which llama.cpp runs, and for how long."""

    llama_cpp: Annotated[Path | None, Setting] = None
    """Folder that holds `llama-bench`; the default is $LLAMA_CPP_DIR, then PATH, then the extra `llama`."""
    llama_cpp_reads_q4_0_64: bool = False
    """State that this llama.cpp build defines Q4_0_64. A stock build reads type 40 as NVFP4 and prints garbage."""
    timeout: Annotated[PositiveInt, Setting] = 3600
    """Seconds before a llama-bench process is ended."""


@dataclass(frozen=True)
class LlamaBench:
    """A program that takes llama-bench's flags and prints its JSON."""

    command: tuple[str, ...]
    """What to start, to which the flags are added."""
    name: str
    """For people: the binary's path, or the wheel and its version."""


def find_llama_bench(folder: Path | None) -> LlamaBench:
    """The binary from a folder, else from $LLAMA_CPP_DIR, else from PATH; else the build in the extra `llama`.

    Raises:
        CameraError: if there is none, or a folder that is named has none; says where it was looked for.
    """
    named = folder or os.environ.get("LLAMA_CPP_DIR")
    if named:
        for below in _BELOW:
            path = Path(named) / below / BINARY
            if path.is_file() and os.access(path, os.X_OK):
                return LlamaBench((str(path),), str(path))
        raise CameraError(
            f"llama_cpp: {named} holds no {BINARY} (nor do its bin/ and build/bin/): build llama.cpp there, or name "
            "another folder"
        )
    if found := shutil.which(BINARY):
        return LlamaBench((found,), found)
    if importlib.util.find_spec(_WHEEL) is not None:
        # -P: the script's folder stays off the path, where its neighbours' names could hide other modules.
        command = (sys.executable, "-P", xllama.__file__)
        return LlamaBench(command, f"{_WHEEL} {importlib.metadata.version(_WHEEL)}")
    raise CameraError(
        f"llama.cpp: {BINARY} is not on PATH, nor is the extra `llama` installed: `pip install 'camera-npu[llama]'`, "
        "or set `llama_cpp` or $LLAMA_CPP_DIR to the folder of a build"
    )


def build_digest(folder: Path | None) -> str | None:
    """What tells one build from another: the wheel's name and version, or the sha256 over the binary and the libraries beside
    it, which is where the code of a shared build is. None if there is no build."""
    try:
        bench = find_llama_bench(folder)
    except CameraError:
        return None
    if len(bench.command) > 1:
        return bench.name
    binary = Path(bench.command[0]).resolve()
    libraries = (
        path for below in ("", "../lib") for path in (binary.parent / below).glob("lib*") if path.is_file()
    )
    files = {path.resolve() for path in (binary, *libraries)}
    return digest_json(sorted([path.name, digest_file(path)] for path in files))


class LlamaCppEngine(Engine):
    """llama-bench on one GGUF. The process loads the model each time, warms up by itself, and is then timed.

    Unlike the torch engine it decodes each length in a run of its own, the binary from an empty context. In the place
    of a Q4_0_64 file that the build does not read it runs the file's lossless Q4_0 twin, and `stand_in` says so.
    """

    options = LlamaCppOptions
    settings = ("GGML_",)

    def __init__(self, path: Path, options: BenchmarkOptions) -> None:
        """Find the binary, open the file's metadata, and make its twin if it takes one.

        Raises:
            CameraError: if there is no binary, or the model is no GGUF.
        """
        self.asked, self.own = options, options.of(LlamaCppOptions)
        self.bench = find_llama_bench(self.own.llama_cpp)
        if path.is_dir():
            raise CameraError(f"{path} is a folder: llama.cpp reads GGUF files, give the GGUF of this model")
        self.path, self.gguf = path, open_gguf(path)
        self._scratch: TemporaryDirectory[str] | None = None
        if is_q4_0_64(self.gguf) and not self.own.llama_cpp_reads_q4_0_64:
            self._scratch = TemporaryDirectory(prefix="camera-twin-")
            self.path = stock_twin(self.gguf, Path(self._scratch.name))
            self.gguf = open_gguf(self.path)
            self.stand_in = "its Q4_0 twin"
        self.config = hf_config(self.gguf)
        self.positions = int(self.config["max_position_embeddings"])
        self._build: dict[str, Any] = {}
        self._peak_bytes = 0

    @classmethod
    def load(cls, path: Path, options: BenchmarkOptions, device: "torch.device") -> Self:
        return cls(path, options)

    @classmethod
    def build(cls, options: BenchmarkOptions) -> str:
        return find_llama_bench(options.of(LlamaCppOptions).llama_cpp).name

    @classmethod
    def identity(cls, options: BenchmarkOptions) -> dict[str, Any]:
        return {**super().identity(options), "build": build_digest(options.of(LlamaCppOptions).llama_cpp)}

    def time_once(self, prompt: int, decode: Sequence[int]) -> Timing:
        lengths = sorted(set(decode))
        command = [*self.bench.command, "-m", str(self.path), "-p", str(prompt), "-r", "1", "-o", "json"]
        command += ["-n", ",".join(map(str, lengths))]
        if self.asked.threads:
            command += ["-t", str(self.asked.threads)]
        if self.asked.device != "auto":
            command += ["-ngl", "0" if self.asked.device == "cpu" else "99"]
        tests = self._parse(self._run(command))
        seconds = {(test["n_prompt"], test["n_gen"]): test["samples_ns"][0] / 1e9 for test in tests}
        try:
            return Timing(seconds[prompt, 0], {length: seconds[0, length] for length in lengths})
        except KeyError as missing:
            raise CameraError(
                f"{self.bench.name} did not report the test (prompt, decode) {missing}"
            ) from None

    def _run(self, command: list[str]) -> str:
        """Standard output of a process that ends by itself; its whole process group is killed if it does not."""
        timeout = self.own.timeout
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        ) as process:
            deadline = monotonic() + timeout
            try:
                while True:
                    try:
                        wait = min(_POLL_S, max(0, deadline - monotonic()))
                        output, errors = process.communicate(timeout=wait)
                        break
                    except subprocess.TimeoutExpired:
                        self._peak_bytes = max(self._peak_bytes, _resident_bytes(process.pid))
                        if monotonic() >= deadline:
                            raise CameraError(
                                f"{self.bench.name} was ended after {timeout} s on {self.path}: raise `timeout` or "
                                "ask for fewer tokens"
                            ) from None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        if process.returncode != 0:
            last = "\n".join(errors.strip().splitlines()[-5:]) or "it said nothing"
            raise CameraError(
                f"{self.bench.name} failed with exit code {process.returncode} on {self.path}: {last}"
            )
        return output

    def _parse(self, output: str) -> list[dict[str, Any]]:
        try:
            tests: list[dict[str, Any]] = json.loads(output)
            self._build = {key: tests[0][key] for key in _BUILD_KEYS if key in tests[0]}
        except (json.JSONDecodeError, LookupError, TypeError):
            raise CameraError(
                f"{self.bench.name} -o json printed something else: {output[:200]!r}; is this llama.cpp's {BINARY}?"
            ) from None
        return tests

    def footprint(self) -> Footprint:
        """The process's resident memory stands for its peak; what lies on an accelerator is not seen."""
        family, names = family_of(self.config, str(self.path)), hf_names(self.gguf)
        merged = {
            names[name] for name, placed in family.names(self.config).items() if placed.expert is not None
        }
        sizes = {name: tensor.size_bytes for name, tensor in self.gguf.tensors.items()}
        for name in merged:
            assert family.experts is not None
            sizes[name] = family.experts.used(self.config, sizes[name])
        if family.name("head") in names:
            del sizes[names[family.name("embedding")]]
        return Footprint(
            model_bytes=self.path.stat().st_size,
            held_bytes=None,
            peak_bytes=self._peak_bytes or None,
            weight_bytes_per_token=sum(sizes.values()),
            kv_bytes_per_position=2 * cached_numbers(self.gguf),  # in f16
        )

    def describe(self) -> dict[str, Any]:
        settings = {name: value for name, value in sorted(os.environ.items()) if name.startswith("GGML_")}
        return {"binary": self.bench.name, **self._build, "settings": settings}

    def close(self) -> None:
        if self._scratch is not None:
            self._scratch.cleanup()


def _resident_bytes(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:  # it has just ended
        return 0


def stock_twin(file: GgufFile, scratch: Path) -> Path:
    """The twin that lies beside a file under the name that conversion gives it, else one written to `scratch`.

    Raises:
        CameraError: if the file holds no Q4_0_64, or a type that is not written here.
        OSError: if there is no room for it: 4.5 bits per weight.
    """
    name = f"{file.path.stem}-q4_0-twin.gguf"
    beside = file.path.with_name(name)
    if beside.is_file() and _is_twin(beside, file):
        return beside
    write_twin(file.path, scratch / name)
    return scratch / name


def _is_twin(path: Path, file: GgufFile) -> bool:
    """Whether a file has the tensors of the other, and the first row of each holds the same numbers."""
    try:
        candidate = open_gguf(path)
    except CameraError:
        return False
    if candidate.metadata.get(TWIN_KEY) != "q4_0_64" or candidate.tensors.keys() != file.tensors.keys():
        return False
    for name, tensor in file.tensors.items():
        other = candidate.tensors[name]
        row = tensor.data[:1]
        type, expected = ("q4_0", Q4_0_64().twin(row)) if tensor.type == "q4_0_64" else (tensor.type, row)
        if (other.type, other.shape) != (type, tensor.shape) or not np.array_equal(other.data[:1], expected):
            return False
    return True


ENGINES.register("llama.cpp", LlamaCppEngine)
