"""Models run by llama.cpp: a `llama-bench` of the user's, or the build in the extra `llama`. One process for each turn."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Self

import numpy as np
import torch

from camera.devices import describe_device, driver_versions
from camera.engines import ENGINES, Engine, Footprint, Timing
from camera.engines.parts.llama_build import find_build, run
from camera.engines.parts.llama_probe import (
    Probe,
    Reading,
    ask_reading,
    backend_settings,
    layer_flags,
    probe_build,
    read_probe,
)
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
from camera.mapped import release_pages
from camera.models import family_of
from camera.options import BenchmarkOptions, Options, PositiveInt, Setting

_COMPARED_BYTES = 8 << 20
"""Of two files' tensors, at once."""
_BUILD_KEYS = (
    *("build_commit", "build_number", "backends", "cpu_info", "system_info", "gpu_info"),
    *("n_threads", "n_gpu_layers", "model_type"),
)


class LlamaCppOptions(Options):
    """Which llama.cpp runs, and for how long."""

    llama_cpp: Annotated[Path | None, Setting] = None
    """Folder that holds `llama-bench`; the default is $LLAMA_CPP_DIR, then PATH, then the extra `llama`."""
    llama_cpp_stock: Annotated[Path | None, Setting] = None
    """Folder of another build, for files without Q4_0_64 (the baseline, a twin); the default is the same build."""
    timeout: Annotated[PositiveInt, Setting] = 3600
    """Seconds before a llama-bench process is ended."""


class LlamaCppEngine(Engine):
    """llama-bench on one GGUF. The process loads the model each time, warms up by itself, and is then timed.

    Unlike the torch engine it decodes each length in a run of its own, the binary from an empty context. In the place
    of a Q4_0_64 file that the build does not read it runs the file's lossless Q4_0 twin, and `stand_in` says so.
    """

    options = LlamaCppOptions
    settings = ("GGML_",)

    def __init__(self, path: Path, options: BenchmarkOptions, device: torch.device) -> None:
        """Find the build, open the file's metadata, ask the build where it computes and what it reads, and make the file's
        twin if it takes one.

        Raises:
            CameraError: if there is no binary, the model is no GGUF, or the build would not compute on the device.
        """
        self.asked, self.own, self.device = options, options.of(LlamaCppOptions), device
        self.path, self.reading = path, Reading(reads=None)
        self.probe: Probe | None = None
        self._scratch: TemporaryDirectory[str] | None = None
        self._build: dict[str, Any] = {}
        self._peak_bytes = 0
        self.bench = find_build(self.own.llama_cpp)
        if path.is_dir():
            raise CameraError(f"{path} is a folder: llama.cpp reads GGUF files, give the GGUF of this model")
        self.gguf = open_gguf(path)
        if is_q4_0_64(self.gguf):
            self._use(self.own.llama_cpp, "llama_cpp")
            card = {"name": describe_device(device)["name"], **driver_versions(device)}
            self.reading = ask_reading(self.bench, self._flags, card)
            if not self.reading.reads:
                self._take_twin()
        elif self.own.llama_cpp_stock is not None:
            self._use(self.own.llama_cpp_stock, "llama_cpp_stock")
        else:
            self._use(self.own.llama_cpp, "llama_cpp")
        self.config = hf_config(self.gguf)
        self.positions = int(self.config["max_position_embeddings"])

    @classmethod
    def load(cls, path: Path, options: BenchmarkOptions, device: torch.device) -> Self:
        return cls(path, options, device)

    @classmethod
    def build(cls, options: BenchmarkOptions) -> str:
        own = options.of(LlamaCppOptions)
        names = [find_build(own.llama_cpp).name]
        if own.llama_cpp_stock is not None:
            names.append(find_build(own.llama_cpp_stock, "llama_cpp_stock").name)
        return ", ".join(names)

    @classmethod
    def identity(cls, options: BenchmarkOptions) -> dict[str, Any]:
        own = options.of(LlamaCppOptions)
        found = {**super().identity(options), "build": _digest(own.llama_cpp)}
        return found if own.llama_cpp_stock is None else {**found, "stock": _digest(own.llama_cpp_stock)}

    def time_once(self, prompt: int, decode: Sequence[int]) -> Timing:
        lengths = sorted(set(decode))
        command = [*self.bench.command, "-m", str(self.path), "-p", str(prompt), "-r", "1", "-o", "json"]
        command += ["-n", ",".join(map(str, lengths))]
        if self.asked.threads:
            command += ["-t", str(self.asked.threads)]
        done = run([*command, *self._flags], f"{self.bench.name} on {self.path}", self.own.timeout)
        self._peak_bytes = max(self._peak_bytes, done.peak_bytes)
        tests = self.bench.tests(done.output)
        self._build = {key: tests[0][key] for key in _BUILD_KEYS if key in tests[0]}
        self._refuse_elsewhere(read_probe(tests[0]))
        seconds = {(test["n_prompt"], test["n_gen"]): test["samples_ns"][0] / 1e9 for test in tests}
        try:
            return Timing(seconds[prompt, 0], {length: seconds[0, length] for length in lengths})
        except KeyError as missing:
            raise CameraError(
                f"{self.bench.name} did not report the test (prompt, decode) {missing}"
            ) from None

    def _use(self, folder: Path | None, option: str) -> None:
        """Take a build, and refuse one that would compute elsewhere than on the device."""
        self.bench = find_build(folder, option)
        if self.device.type != "cpu":
            self.probe = probe_build(self.bench, self.device)
            self._refuse_elsewhere(self.probe)

    def _refuse_elsewhere(self, probe: Probe) -> None:
        if (reason := probe.why_not_on(self.device.type)) is not None:
            raise CameraError(f"{self.bench.name} does not run on {self.device}: {reason}")

    @property
    def _flags(self) -> tuple[str, ...]:
        """Where the layers are computed; llama.cpp's own choice where the device is left to it and torch has no accelerator."""
        own_choice = self.device.type == "cpu" and self.asked.device != "cpu"
        return () if own_choice else layer_flags(self.device)

    def _take_twin(self) -> None:
        self._scratch = TemporaryDirectory(prefix="camera-twin-")
        self.path = stock_twin(self.gguf, Path(self._scratch.name))
        self.gguf = open_gguf(self.path)
        because = "cannot be asked about" if self.reading.reads is None else "does not read"
        self.stand_in = f"its Q4_0 twin: the build {because} Q4_0_64"
        if self.own.llama_cpp_stock is not None:
            self._use(self.own.llama_cpp_stock, "llama_cpp_stock")

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
        mode = {} if self.probe is None else {"execution_mode": self.probe.execution_mode}
        why = {} if self.reading.why_not is None else {"why_twin": self.reading.why_not}
        return {"binary": self.bench.name, **self._build, **mode, **why, "settings": backend_settings()}

    def close(self) -> None:
        if self._scratch is not None:
            self._scratch.cleanup()


def _digest(folder: Path | None) -> str | None:
    """Of the build in a folder, or that is found without one; None if there is none."""
    try:
        return find_build(folder).digest()
    except CameraError:
        return None


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
    """Whether a file has the tensors of the other, and the same numbers: whose it is does not matter then."""
    try:
        candidate = open_gguf(path)
    except CameraError:
        return False
    if candidate.metadata.get(TWIN_KEY) != "q4_0_64" or candidate.tensors.keys() != file.tensors.keys():
        return False
    for name, tensor in file.tensors.items():
        other, packed = candidate.tensors[name], tensor.type == Q4_0_64.name
        if (other.type, other.shape) != ("q4_0" if packed else tensor.type, tensor.shape):
            return False
        step = max(1, _COMPARED_BYTES // max(1, tensor.data[:1].nbytes))
        for start in range(0, len(tensor.data), step):
            rows, others = tensor.data[start : start + step], other.data[start : start + step]
            if not np.array_equal(others, Q4_0_64().twin(rows) if packed else rows):
                return False
            release_pages(rows)
            release_pages(others)
    return True


ENGINES.register("llama.cpp", LlamaCppEngine)
