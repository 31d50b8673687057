"""Imports, one by one, and the first tensor on the device. Here torch is imported where it may fail."""

import importlib
import pkgutil
from pathlib import Path
from time import perf_counter

import camera
from camera.ascend.causes import CANN_MODULES
from camera.device_check.context import Context
from camera.device_check.schema import Measurement

_ALWAYS = ("numpy", "torch", "transformers", "safetensors", "gguf", "sentencepiece", "datasets")
_EXTRAS = {"lm_eval": "tasks", "xllamacpp": "llama"}
"""What our modules import that an extra brings."""
_OTHERS_SHARE = 1 / 8
"""Of an accelerator's memory: if more is taken before anything is done here, somebody else works on it."""

_LIBRARY, _STUBS_VARIABLE = "libascendcl.so", b"STUB_CANN"


def run(context: Context) -> None:
    """Import what the pipeline stands on, then every module of the library, then use the device."""
    modules = [*_ALWAYS, *(("torch_npu", *CANN_MODULES) if context.options.kind == "npu" else ())]
    modules += [
        each.name for each in pkgutil.walk_packages(camera.__path__, "camera.") if "__main__" not in each.name
    ]
    for name in modules:
        began = perf_counter()
        try:
            importlib.import_module(name)
        except Exception as error:  # a library that is not found raises OSError, torch_npu RuntimeError
            reason = f"{type(error).__name__}: {error}"
            if (extra := _missing_extra(error)) is not None:
                reason = f"the extra `{extra}` is not installed: {error}"
            # What CANN's own Python wants is seen to be wanted by the operators.
            optional = name in CANN_MODULES or extra is not None
            context.add(
                Measurement(what="import", of={"module": name}, unit="s", error=reason, optional=optional)
            )
            if name in _ALWAYS or name == "torch_npu":
                raise
            continue
        if not name.startswith("camera."):
            context.measure("import", perf_counter() - began, "s", module=name)
    context.measure("modules imported", len(modules))
    _use_device(context)


def _missing_extra(error: Exception) -> str | None:
    """The extra without which a module cannot be imported."""
    if not isinstance(error, ModuleNotFoundError):
        return None
    return _EXTRAS.get((error.name or "").partition(".")[0])


def _use_device(context: Context) -> None:
    import torch  # not at the top of this module: whether it can be imported was the question

    from camera.devices import describe_device, free_memory_bytes, total_memory_bytes

    device = context.device
    began = perf_counter()
    total = torch.arange(1000, device=device).sum()
    context.add(Measurement(what="sum of 0 to 999", value=float(total), at_least=499500, at_most=499500))
    context.measure("first use of the device", perf_counter() - began, "s")
    described = describe_device(device)
    context.tell(name=described["name"], described=described, stub=device.type == "npu" and _is_stub())
    if device.type != "cpu":
        share = free_memory_bytes(device) / total_memory_bytes(device)
        context.add(Measurement(what="free share of its memory", value=share, at_least=1 - _OTHERS_SHARE))


def _is_stub() -> bool:
    """Whether the CANN that torch_npu loaded is a stub for tests, which reads a variable of that name."""
    mapped = Path("/proc/self/maps").read_text(encoding="utf-8")
    libraries = {line.split()[-1] for line in mapped.splitlines() if _LIBRARY in line}
    return any(_STUBS_VARIABLE in Path(each).read_bytes() for each in libraries)
