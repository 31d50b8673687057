"""Steps that do what a test wants, and count how often they ran."""

import ctypes
import sys
import time
from pathlib import Path

from camera.device_check.context import Context
from camera.device_check.plan import Step
from camera.device_check.schema import Measurement


def toy(name: str, do: str, *needs: str, seconds: int = 60) -> Step:
    return Step(name, f"Toy {name}", __name__, seconds, needs, given={"do": do, "name": name})


def runs(out: Path, name: str) -> int:
    file = out / f"ran-{name}"
    return len(file.read_text()) if file.is_file() else 0


def run(context: Context, do: str, name: str) -> None:
    with (context.findings.parents[1] / f"ran-{name}").open("a") as file:
        file.write("x")
    context.measure("size", 3, "B", of_what="toy")
    if do == "crash":
        ctypes.string_at(0)
    if do == "hang":
        time.sleep(600)
    if do == "raise":
        raise RuntimeError("libhccl.so: cannot open shared object file")
    if do == "miss":
        context.add(Measurement(what="error", value=2.0, at_most=1.0))
        context.add(Measurement(what="another way", error="not here", optional=True))
    if do == "miscompute":
        context.add(Measurement(what="error", value=float("nan"), at_most=1.0))
        context.measure("time", float("inf"), "s")
        context.add(Measurement(what="forgotten"))
        context.add(Measurement(what="sum", value=1, at_least=2, at_most=2))
    if do == "fall back":
        sys.stdout.write("CAUTION: 'aten::x' will fall back to run on the CPU\n")
    if do == "print":
        sys.stdout.write(f"token hf_{'a' * 30} in {Path.home()}/models, {context.findings.parents[1]}\n")
    context.tell(name=f"toy {name}")
