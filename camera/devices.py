"""The devices that can compute: which one a name means, what it is, and how to time and weigh work on it."""

import importlib
import importlib.util
import os
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any

import psutil
import torch

from camera import heap
from camera.ascend import causes, host
from camera.ascend.pairing import why_unpaired
from camera.blocking import blocking
from camera.errors import CameraError
from camera.versions import installed

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PROC = Path("/proc")
BANDWIDTH_BUFFER_BYTES = 512 << 20
"""Read to measure a CPU's bandwidth: enough to leave no part of note in the caches."""
_COPIED_BYTES = 4 << 30
"""Copied to measure an accelerator's; caches of hundreds of megabytes speed up what is smaller."""
_TRIES = 5
"""Of a measurement; the fastest counts."""


def why_no_npu() -> str | None:
    """None if torch can compute on an Ascend NPU here, else the cause and what to do.

    The first call imports torch_npu where it is installed.
    """
    if importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not installed: install the extra `npu` on a host that has CANN"
    try:
        importlib.import_module("torch_npu")
    except (ImportError, OSError, RuntimeError) as error:
        unpaired = why_unpaired(torch.__version__, installed("torch-npu"), None)
        advice = causes.advice(str(error)) or unpaired or causes.SOURCE_CANN
        return f"torch_npu is installed and cannot be loaded: {advice} ({error})"
    if not torch.get_device_module("npu").is_available():
        return "torch_npu is loaded and finds no NPU: look at npu-smi info, ASCEND_RT_VISIBLE_DEVICES and the driver"
    return None


def why_no_cuda() -> str | None:
    """None if torch can compute on a CUDA GPU here, else the cause and what to do."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA: install a CUDA build of the same version"
    if not torch.cuda.is_available():
        return "torch finds no GPU: look at nvidia-smi, CUDA_VISIBLE_DEVICES and the driver's version"
    return None


def resolve_device(name: str) -> torch.device:
    """The device that `auto`, `cpu`, `cuda[:N]` or `npu[:N]` means on this machine, which this thread uses from now on.

    `auto` is the NPU where torch_npu loads and finds one, else CUDA, else the CPU.

    Raises:
        CameraError: for another name, or a device that this machine lacks; says why.
    """
    device = find_device(name)
    use_device(device)
    if device.type == "npu":
        # Kernels compiled at first use take minutes for every new shape; the shipped binaries do not.
        torch.get_device_module("npu").set_compile_mode(jit_compile=False)
    return device


def find_device(name: str) -> torch.device:
    """The device that `resolve_device` gives, without any use of it: an accelerator keeps memory for whoever uses it.

    Raises:
        CameraError: as `resolve_device`.
    """
    if name == "auto":
        if why_no_npu() is None:
            return find_device("npu")
        return torch.device("cuda", 0) if why_no_cuda() is None else torch.device("cpu")
    matched = re.fullmatch(r"(cpu|cuda|npu)(?::(\d+))?", name)
    if matched is None or (matched[1] == "cpu" and matched[2]):
        raise CameraError(f"device: {name!r} is none of auto, cpu, cuda, cuda:N, npu, npu:N")
    kind, number = matched[1], int(matched[2] or 0)
    if kind == "cpu":
        return torch.device("cpu")
    if missing := (why_no_npu() if kind == "npu" else why_no_cuda()):
        raise CameraError(f"device: {name} cannot be used: {missing}. `device: auto` takes what there is")
    _refuse_beyond(torch.device(kind, number), f"device: {name}")
    return torch.device(kind, number)


def devices_of(name: str, count: int) -> tuple[torch.device, ...]:
    """The devices of a run of several ranks, one for each: accelerators from the one that is named on, or the CPU for all.

    Raises:
        CameraError: as `resolve_device`; if there are not so many from that one on.
    """
    first = find_device(name)
    devices = tuple(rank_device(first, rank) for rank in range(count))
    _refuse_beyond(devices[-1], f"devices: {count} from {first} on are up to {devices[-1]}, which")
    return devices


def rank_device(device: torch.device, rank: int) -> torch.device:
    """The device of a rank, given that of the first."""
    return device if device.type == "cpu" else torch.device(device.type, device.index + rank)


def _refuse_beyond(device: torch.device, what: str) -> None:
    if device.type == "cpu":
        return
    there = torch.get_device_module(device.type).device_count()
    if device.index >= there:
        raise CameraError(
            f"{what} does not exist: this machine has {there} {device.type}, of which the last is "
            f"{device.type}:{there - 1}; begin at a lower number or use fewer"
        )


def resolve_dtype(name: str, checkpoint_dtype: torch.dtype) -> torch.dtype:
    """The dtype that `float32`, `bfloat16`, `float16` or `auto` (the checkpoint's own) means.

    Raises:
        CameraError: for another name, or `auto` of a checkpoint whose weights are none of the three.
    """
    if name == "auto":
        if checkpoint_dtype not in _DTYPES.values():
            raise CameraError(
                f"dtype: auto means the checkpoint's {checkpoint_dtype}, which layers cannot compute in; "
                f"choose one of {', '.join(_DTYPES)}"
            )
        return checkpoint_dtype
    if name not in _DTYPES:
        raise CameraError(f"dtype: {name!r} is none of auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16, and so on."""
    return str(dtype).removeprefix("torch.")


def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64: an NPU does not."""
    return device.type in ("cpu", "cuda")


def exact_device(device: torch.device) -> torch.device:
    """Where float64 is, and with it the factors and solutions that an NPU has no operators for."""
    return device if has_float64(device) else torch.device("cpu")


def pinned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """New memory of the host that an accelerator copies from and to while the host goes on; for a CPU any memory."""
    with torch.inference_mode(False):  # one made in it could not be written to by another thread
        return torch.empty(shape, dtype=dtype, pin_memory=device.type != "cpu")


def use_device(device: torch.device) -> None:
    """Make a device this thread's own. Each begins with the first of its kind, and what names no device, as pinned memory
    and events do, then takes memory of that one too, which may be somebody else's."""
    if device.type != "cpu":
        torch.get_device_module(device.type).set_device(device)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was queued on it."""
    if device.type != "cpu":
        torch.get_device_module(device.type).synchronize(device)


def release_memory(device: torch.device) -> None:
    """Give memory that the allocator caches back to the device; on the CPU, to the system."""
    if device.type != "cpu":
        torch.get_device_module(device.type).empty_cache()
    else:
        heap.trim()


def memory_bytes(device: torch.device) -> int:
    """Bytes in use now: by tensors on an accelerator, resident in this process on the CPU."""
    if device.type != "cpu":
        return int(torch.get_device_module(device.type).memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


def peak_memory_bytes(device: torch.device) -> int:
    """Largest `memory_bytes` since `reset_peak_memory`, or since the process began where that could not reset."""
    if device.type != "cpu":
        return int(torch.get_device_module(device.type).max_memory_allocated(device))
    status = _PROC / "self" / "status"
    if status.exists() and (found := re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)):
        return int(found[1]) * 1024
    import resource  # Unix only

    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_memory(device: torch.device) -> bool:
    """Begin a new measurement of `peak_memory_bytes`; False where the system cannot forget an older peak."""
    if device.type != "cpu":
        torch.get_device_module(device.type).reset_peak_memory_stats(device)
        return True
    try:
        (_PROC / "self" / "clear_refs").write_text("5")  # Linux: "reset the peak resident set size"
    except OSError:
        return False
    return True


def free_memory_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated; on an accelerator those that torch's allocator keeps unused are among them."""
    if device.type != "cpu":
        module = torch.get_device_module(device.type)
        kept = module.memory_reserved(device) - module.memory_allocated(device)
        return int(module.mem_get_info(device)[0] + kept)
    return int(psutil.virtual_memory().available)


def total_memory_bytes(device: torch.device) -> int:
    """Bytes the device has in all."""
    if device.type != "cpu":
        return int(torch.get_device_module(device.type).mem_get_info(device)[1])
    return int(psutil.virtual_memory().total)


@dataclass(frozen=True)
class Bandwidth:
    """How fast a device reaches its memory."""

    bytes_per_second: float
    measured_by: str
    """For people: what was timed."""


def memory_bandwidth(device: torch.device) -> Bandwidth:
    """How fast a device reaches its memory, the limit of batch-1 decoding, which reads every weight for every token.

    A CPU, with torch's current threads, sums a tensor. An accelerator copies one that its caches do not hold, as a sum
    of less is partly read from them.
    """
    if device.type != "cpu":
        size = min(_COPIED_BYTES, free_memory_bytes(device) // 3)
        told = f"copies of {size / 2**30:.1f} GiB, bytes read and written"
        return Bandwidth(copy_bandwidth(device, size), told)
    count = min(BANDWIDTH_BUFFER_BYTES, free_memory_bytes(device) // 4) // 4
    tensor = torch.ones(count, dtype=torch.float32)
    told = f"sums of {tensor.nbytes / 2**30:.1f} GiB, bytes read"
    return Bandwidth(tensor.nbytes / _best_seconds(tensor.sum, device), told)


def copy_bandwidth(device: torch.device, size: int) -> float:
    """Bytes per second, read and written together, of copying a buffer to another one; the best of five tries.

    Args:
        device: where both are.
        size: bytes of each buffer.
    """
    speed = _copy_speed(device, size // 4)
    release_memory(device)
    return speed


def _copy_speed(device: torch.device, count: int) -> float:
    source = torch.zeros(count, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)
    return (source.nbytes + target.nbytes) / _best_seconds(lambda: target.copy_(source), device)


def _best_seconds(work: Callable[[], object], device: torch.device) -> float:
    seconds = []
    for _ in range(_TRIES):
        synchronize(device)
        start = perf_counter()
        work()
        synchronize(device)
        seconds.append(perf_counter() - start)
    return min(seconds)


def driver_versions(device: torch.device) -> dict[str, str | None]:
    """Versions of what computes on an accelerator below torch and other engines; None where one is not found."""
    if device.type == "npu":
        found = host.facts()
        return {"cann": found.cann, "driver": found.driver, "firmware": found.firmware}
    if device.type == "cuda":
        told = _PROC / "driver" / "nvidia" / "version"
        driver = re.search(r"^NVRM version:.*?\s(\d+[\d.]+)\s", told.read_text()) if told.is_file() else None
        return {"cuda": torch.version.cuda, "driver": None if driver is None else driver[1]}
    return {}


def refuse_false_times(device: torch.device) -> None:
    """Raise CameraError where every time of a device would be wrong."""
    if (name := blocking(device.type)) is not None:
        raise CameraError(
            f"{name} is set: the host waits for every launch, and times mean nothing; unset it. To look for an operator "
            "that fails, run a single step, such as `camera prune`"
        )


def describe_device(device: torch.device) -> dict[str, Any]:
    """What a reader of a result must know of the device, as plain JSON.

    Keys: device, kind, name, memory_bytes, threads (CPU threads of torch), clock_mhz (maximum if known, else
    None), settings (environment variables that change speed), and for an NPU ascend: the `HostFacts` but its cards.
    """
    described = {
        "device": str(device),
        "kind": device.type,
        "name": _device_name(device),
        "memory_bytes": total_memory_bytes(device),
        "threads": torch.get_num_threads(),
        "clock_mhz": _clock_mhz(device),
        "settings": {
            **{
                name: value for name, value in sorted(os.environ.items()) if name.startswith(("OMP_", "MKL_"))
            },
            **host.settings(os.environ),
        },
    }
    if device.type == "npu":
        described["ascend"] = host.facts().model_dump(exclude={"cards", "npu_smi", "environment"})
    return described


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return _cpu_name()
    return str(torch.get_device_module(device.type).get_device_name(device))


@cache
def _cpu_name() -> str:
    info = _PROC / "cpuinfo"
    if info.exists() and (found := re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)):
        return found[1].strip()
    return platform.processor() or platform.machine()


def _clock_mhz(device: torch.device) -> float | None:
    if device.type == "cuda":
        khz = getattr(torch.cuda.get_device_properties(device), "clock_rate", None)
        return None if khz is None else khz / 1000
    if device.type == "cpu" and hasattr(psutil, "cpu_freq"):
        clock = psutil.cpu_freq()
        return None if clock is None else round(clock.max or clock.current, 1)
    return None
