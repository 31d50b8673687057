"""What this machine can do, what it lacks, and what to do about it; findings as data, for a command to print."""

import importlib.metadata
import importlib.util
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

Status = Literal["ok", "warn", "missing"]

_NEEDED = (
    "torch",
    "transformers",
    "safetensors",
    "tokenizers",
    "sentencepiece",
    "datasets",
    "gguf",
    "numpy",
    "pydantic",
    "prefect",
    "fastapi",
    "sqlalchemy",
    "mlflow",
    "dvc",
)
_LEAST_FREE = 4 << 30
"""Bytes below which only tiny models can be worked on."""


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    section: str
    """`packages`, `devices`, `engines` or `memory`."""
    name: str
    status: Status
    """`ok`; `warn`: works with a limit; `missing`: what needs it will fail."""
    detail: str
    """What was found."""
    advice: str = ""
    """What to do, where something is not ok."""


def diagnose(llama_cpp: Path | None = None) -> list[Finding]:
    """Look at the packages, devices, engines and memory of this machine.

    Nothing raises: what fails is a finding. Orchestrators are looked at by their metadata, not imported.

    Args:
        llama_cpp: folder with `llama-bench`, if the user names one.
    """
    findings = [
        Finding("packages", "python", "ok", platform.python_version()),
        *(_package(name) for name in _NEEDED),
    ]
    if (torch_failure := _torch_failure()) is not None:
        return [*findings, torch_failure, _memory()]
    return [*findings, *_devices(), _llama_bench(llama_cpp), _memory()]


def _package(name: str) -> Finding:
    try:
        return Finding("packages", name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(
            "packages",
            name,
            "missing",
            "not installed",
            "install the project with its constraints: pip install -c constraints.txt -e .",
        )


def _torch_failure() -> Finding | None:
    """torch imports every installed backend, and a torch_npu without CANN takes torch down with it."""
    try:
        importlib.import_module("torch")
    except (ImportError, OSError, RuntimeError) as error:
        advice = "install torch again"
        if importlib.util.find_spec("torch_npu") is not None:
            advice = (
                "torch_npu is installed and is loaded with torch, which needs CANN: source CANN's set_env.sh, or set "
                "TORCH_DEVICE_BACKEND_AUTOLOAD=0 to go without the NPU"
            )
        return Finding("devices", "torch", "missing", f"cannot be imported: {error}", advice)
    return None


def _devices() -> list[Finding]:
    # They import torch, and that torch can be imported has only now been found.
    from camera.devices import describe_device, resolve_device, why_no_cuda, why_no_npu
    from camera.errors import CameraError

    findings = []
    for kind, why_not in (("cpu", None), ("cuda", why_no_cuda()), ("npu", why_no_npu())):
        if why_not is not None:
            cause, _, advice = why_not.partition(": ")
            findings.append(Finding("devices", kind, "warn", cause, advice))
            continue
        try:
            found = describe_device(resolve_device(kind))
        except (CameraError, RuntimeError) as error:
            findings.append(
                Finding("devices", kind, "warn", f"does not answer: {error}", "see its driver's log")
            )
            continue
        detail = f"{found['name']}, {_gib(found['memory_bytes'])}"
        if kind == "cpu":
            detail += f", {found['threads']} threads"
        findings.append(Finding("devices", kind, "ok", detail))
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0":
        findings.append(
            Finding(
                "devices",
                "TORCH_DEVICE_BACKEND_AUTOLOAD",
                "ok",
                "0: torch loads no backend by itself; torch_npu is loaded when an NPU is asked for",
            )
        )
    return findings


def _llama_bench(folder: Path | None) -> Finding:
    from camera.benchmark.llama_cpp import find_llama_bench  # imports torch, as above
    from camera.errors import CameraError

    try:
        return Finding("engines", "llama-bench", "ok", find_llama_bench(folder).name)
    except CameraError as error:
        cause, _, advice = str(error).rpartition(": ")
        return Finding(
            "engines", "llama-bench", "warn", cause, f"{advice}; only the llama.cpp engine needs it"
        )


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    detail = f"{_gib(memory.available)} of {_gib(memory.total)} free"
    if memory.available < _LEAST_FREE:
        advice = (
            f"a 7B model wants more than {_gib(_LEAST_FREE)}: end other programs, or use a larger machine"
        )
        return Finding("memory", "host", "warn", detail, advice)
    return Finding("memory", "host", "ok", detail)


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
