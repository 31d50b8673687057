"""Where the time of a decoded token goes on the device, by operator, as its profiler sees it."""

import csv
import importlib
from collections import defaultdict
from pathlib import Path
from typing import Any

from camera.device_check.context import Context
from camera.device_check.schema import Measurement
from camera.device_check.steps.decode import loaded
from camera.devices import synchronize
from camera.engines.parts.graph import FAILURES
from camera.engines.torch_engine import TorchEngine
from camera.errors import CameraError
from camera.options import BlockType

_TOKENS, _MOST = 4, 20
_NPU_TABLE = "kernel_details.csv"
"""What torch_npu's profiler writes a line of for every kernel."""
Profile = list[tuple[str, int, float]]
"""Operator, calls of a token, microseconds of a token; the slowest first."""


def run(context: Context, type: BlockType | None, pruned: bool) -> None:
    """Decode a few tokens, launch by launch, below the profiler; the step passes without, as profilers need not work.

    Args:
        context: of the step.
        type, pruned: as for `decode`.
    """
    engine = loaded(context, type, pruned)
    if engine.step is not None:
        engine.step.replays = False
    engine.prefill([1])
    engine.decode(1)  # loads kernels
    try:
        found = (_of_npu if context.device.type == "npu" else _of_torch)(engine, context)
    except FAILURES as error:
        reason = f"{error.__class__.__name__}: {error}"
        context.add(Measurement(what="profiled operators", error=reason, optional=True))
        return
    context.measure("profiled operators", len(found))
    for name, calls, microseconds in found[:_MOST]:
        context.measure("time of an operator in a token", microseconds, "µs", operator=name, calls=calls)


def _of_torch(engine: TorchEngine, context: Context) -> Profile:
    from torch.profiler import ProfilerActivity, profile

    on_device = context.device.type != "cpu"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_device else [])]
    with profile(activities=activities) as profiled:
        engine.decode(_TOKENS)
        synchronize(context.device)
    rows = [
        (
            each.key,
            each.count // _TOKENS,
            (each.self_device_time_total if on_device else each.self_cpu_time_total) / _TOKENS,
        )
        for each in profiled.key_averages()
    ]
    return _slowest(rows)


def _of_npu(engine: TorchEngine, context: Context) -> Profile:
    profiler: Any = importlib.import_module("torch_npu").profiler
    folder = context.scratch / "profile"
    with profiler.profile(
        activities=[profiler.ProfilerActivity.NPU],
        on_trace_ready=profiler.tensorboard_trace_handler(str(folder)),
    ):
        engine.decode(_TOKENS)
        synchronize(context.device)
    tables = list(folder.rglob(_NPU_TABLE))
    if not tables:
        raise CameraError(f"the profiler wrote no {_NPU_TABLE}")
    return read_table(tables[0])


def read_table(path: Path) -> Profile:
    """Of kernels, added up by their type."""
    calls: dict[str, int] = defaultdict(int)
    times: dict[str, float] = defaultdict(float)
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            name = row.get("Type") or row["Name"]
            calls[name] += 1
            times[name] += float(row["Duration(us)"])
    return _slowest([(name, calls[name] // _TOKENS, times[name] / _TOKENS) for name in calls])


def _slowest(rows: Profile) -> Profile:
    return sorted((row for row in rows if row[2] > 0), key=lambda row: -row[2])
