"""What this machine can do, what it lacks, and what to do about it; findings as data, for a command to print."""

import importlib
import importlib.util
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import psutil

from camera.ascend import causes
from camera.ascend.host import HELPFUL, HostFacts, facts
from camera.blocking import blocking
from camera.versions import OPTIONAL, PACKAGES, installed

Status = Literal["ok", "warn", "missing"]

_LEAST_FREE = 4 << 30
"""Bytes below which only tiny models can be worked on."""


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    section: str
    """`packages`, `devices`, `ascend`, `engines` or `memory`."""
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
    environment = dict(os.environ)  # as it was given: torch_npu changes it
    if (torch_failure := _torch_failure()) is not None:
        host = facts(environment=environment)
        devices, engines = [torch_failure], []
    else:
        from camera.devices import why_no_npu  # imports torch, which can be imported, as was only now found

        why_no_npu()  # loads torch_npu and opens no card, on which this process would then be found
        host = facts(environment=environment)
        devices, engines = _devices(ascend=host.present), _engines()
    return [*findings, *devices, *(_ascend(host) if host.present else ()), *engines, _memory()]


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
        return Finding(
            "devices",
            "torch",
            "missing",
            f"cannot be imported: {error.__cause__ or error}",
            causes.advice(f"{error}\n{error.__cause__}") or "install torch again",
        )
    return None


def _devices(ascend: bool) -> list[Finding]:
    from camera.devices import describe_device, resolve_device, why_no_cuda, why_no_npu
    from camera.errors import CameraError

    findings = []
    for kind, why_not in (("cpu", None), ("cuda", why_no_cuda()), ("npu", why_no_npu())):
        if why_not is not None and ascend and kind == "cuda":
            continue  # nobody looks for a GPU there, and torch must be a CPU build
        if why_not is not None:
            cause, _, advice = why_not.partition(": ")
            # transformers imports a torch_npu that is installed, for whatever device.
            broken = kind == "npu" and installed("torch-npu") and "torch_npu" not in sys.modules
            findings.append(Finding("devices", kind, "missing" if broken else "warn", cause, advice))
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
    return findings


def _ascend(host: HostFacts) -> list[Finding]:
    """The versions, cards and settings of an Ascend host."""

    def row(name: str, detail: str, advice: str = "") -> Finding:
        return Finding("ascend", name, "warn" if advice else "ok", detail, advice)

    versions = {"torch": host.torch, "torch_npu": host.torch_npu, "CANN": host.cann}
    pairing = ", ".join(f"{name} {version or 'not found'}" for name, version in versions.items())
    rows = [
        row("pairing", pairing, host.unpaired or ("" if host.cann else causes.SOURCE_CANN)),
        row(
            "driver",
            f"{host.driver or 'not found'}, firmware {host.firmware or 'not found'}",
            ""
            if host.driver
            else "install it, or mount the host's /usr/local/Ascend/driver into the container",
        ),
        *_cards(host),
    ]
    lacking = [package for name, package in causes.CANN_MODULES.items() if not importlib.util.find_spec(name)]
    if lacking:
        detail = f"{', '.join(lacking)} not installed, which CANN's Python needs"
        rows.append(row("modules", detail, f"pip install {' '.join(lacking)}"))
    if (torch := sys.modules.get("torch")) is not None and torch.version.cuda is not None:
        advice = "install a CPU build: this one brings triton, which overwrites the module of triton-ascend"
        rows.append(row("torch", f"a build for CUDA {torch.version.cuda}", advice))
    if host.internal_formats is not None:
        switch = "on" if host.internal_formats else "off, as torch_npu begins; what needs them turns them on"
        rows.append(row("formats", f"tiled weights (allow_internal_format) are {switch}"))
        rows.append(row("graphs", "NPUGraph is there" if host.graphs else "this torch_npu has no NPUGraph"))
    return [*rows, row("settings", _pairs(host.environment) or "none", _settings_advice(host.environment))]


def _settings_advice(environment: Mapping[str, str]) -> str:
    false = [name for name in [blocking("npu", environment)] if name]
    unset = {name: value for name, value in HELPFUL.items() if name not in environment}
    return "; ".join(
        (
            *(f"unset {name} before anything is timed: the host waits for every launch" for name in false),
            *([f"try {_pairs(unset)}"] if unset else ()),
        )
    )


def _pairs(environment: Mapping[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in environment.items())


def _cards(host: HostFacts) -> Iterator[Finding]:
    if host.npu_smi is not None:
        advice = (
            causes.advice(host.npu_smi) or "install the driver's tools, or mount npu-smi into the container"
        )
        yield Finding("ascend", "cards", "warn", host.npu_smi, advice)
    for number, card in enumerate(host.visible):
        detail = (
            f"{card.name}, {_gib(card.used_bytes)} of {_gib(card.memory_bytes)} in use, health {card.health}"
        )
        advice = "" if card.health == "OK" else f"look at npu-smi info -t health -i {card.npu}"
        if busy := card.why_busy():
            detail, advice = f"{detail}; {busy}", "end it, or take another card: --device npu:N"
        yield Finding("ascend", f"npu:{number}", "warn" if advice else "ok", detail, advice)


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
