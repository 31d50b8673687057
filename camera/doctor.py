"""What this machine can do, what it lacks, and what to do about it; findings as data, for a command to print."""

import importlib
import importlib.util
import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import psutil

from camera.versions import OPTIONAL, PACKAGES, installed

Status = Literal["ok", "warn", "missing"]

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


def diagnose() -> list[Finding]:
    """Look at the packages, devices, engines and memory of this machine.

    Nothing raises: what fails is a finding.
    """
    findings = [
        Finding("packages", "python", "ok", platform.python_version()),
        *installed_packages(name for name in PACKAGES if name not in OPTIONAL or installed(name)),
    ]
    if (torch_failure := _torch_failure()) is not None:
        return [*findings, torch_failure, _memory()]
    return [*findings, *_devices(), *_engines(), _memory()]


def installed_packages(names: Iterable[str]) -> list[Finding]:
    """The versions of packages, by their metadata: nothing is imported."""
    advice = "install the project with its constraints: pip install -c constraints.txt -e ."
    return [
        Finding("packages", name, "ok", version)
        if (version := installed(name)) is not None
        else Finding("packages", name, "missing", "not installed", advice)
        for name in names
    ]


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


def _engines() -> list[Finding]:
    from camera.errors import CameraError  # engines import torch, as above
    from camera.options import BenchmarkOptions
    from camera.registry import ENGINES

    findings = []
    for name, engine in ENGINES.items():
        try:
            findings.append(Finding("engines", name, "ok", engine.build(BenchmarkOptions())))
        except CameraError as error:
            cause, _, advice = str(error).rpartition(": ")
            advice = f"{advice}; only the {name} engine needs it"
            findings.append(Finding("engines", name, "warn", cause, advice))
    return findings


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
