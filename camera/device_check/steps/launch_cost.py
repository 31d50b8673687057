"""What it costs the host to launch an operator, one by one and as a recorded graph: decoding is hundreds of launches a token."""

import statistics
from collections.abc import Callable
from time import perf_counter

import torch
import torch.nn.functional as F

from camera.device_check.context import Context
from camera.device_check.schema import Measurement
from camera.devices import synchronize
from camera.engines.parts.graph import FAILURES, GRAPHS, Graph

_TRIES = 5


@torch.inference_mode()
def run(context: Context) -> None:
    """For operators of almost no work: the time until the host may go on, and until the device is done, per launch."""
    device, count = context.device, context.shapes.launches
    ones = torch.ones(1, device=device)
    row, norm = torch.ones((1, context.shapes.hidden), device=device, dtype=torch.float16), None
    weight = torch.ones((64, context.shapes.hidden), device=device, dtype=torch.float16)
    works: dict[str, Callable[[], object]] = {
        "in-place addition": lambda: ones.add_(1),
        "addition": lambda: ones + 1,
        "RMS norm": lambda: F.rms_norm(row, (row.shape[1],), norm),
        "small matmul": lambda: F.linear(row, weight),
    }
    for name, work in works.items():

        def many(work: Callable[[], object] = work) -> None:
            for _ in range(count):
                work()

        ways: dict[str, Callable[[], object]] = {"eager": many}
        if device.type in GRAPHS:
            try:
                ways["captured"] = Graph(many, device)
            except FAILURES as error:
                of = {"operator": name, "way": "captured"}
                context.add(Measurement(what="time of a launch", of=of, unit="µs", error=str(error)))
        for way, run_all in ways.items():
            host, whole = _seconds(run_all, device)
            of = {"operator": name, "way": way}
            context.measure("host time of a launch", 1e6 * host / count, "µs", **of)
            context.measure("time of a launch", 1e6 * whole / count, "µs", **of)
            if way == "captured":
                context.measure("host time of a replay", 1e6 * host, "µs", operator=name)


def _seconds(work: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Until all is queued, and until all is done; the medians."""
    times = []
    for _ in range(_TRIES + 1):
        synchronize(device)
        began = perf_counter()
        work()
        queued = perf_counter()
        synchronize(device)
        times.append((queued - began, perf_counter() - began))
    hosts, wholes = zip(*times[1:], strict=True)
    return statistics.median(hosts), statistics.median(wholes)
