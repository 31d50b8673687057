"""Time one model in every way in which the torch engine can decode it, in turns.

    python benchmarks/decode_ways.py model-q4_0.gguf --decode 64

The ways: transformers' own forward; with the linear layers of one input joined; in steps of fixed shapes, of transformers'
layers and of fused ones; and, where the device has them, as graphs, of layers as the engine's trial chose. Launches are
operators that compute something, of one token; a graph is one. The host's time is until all is queued: on a device that
computes meanwhile, the rest is the device's. The last column is the bytes that a token reads over its time and the measured
bandwidth.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from common import in_turns, parser_of, save, show, span

from camera.benchmark.report import Spread
from camera.devices import memory_bandwidth, resolve_device, synchronize
from camera.engines.parts import step
from camera.engines.parts.launches import launches_of
from camera.engines.torch_engine import TorchEngine
from camera.errors import CameraError

PLAIN, JOINED, GRAPH = "transformers' forward", "joined layers", "graph"
FIXED = {"fixed step": step.PLAIN, "fixed step, fused": step.FUSED}


class Ways:
    """A model, loaded once as transformers has it and once as the engine decodes it."""

    def __init__(self, path: Path, device: torch.device, capacity: int) -> None:
        self.plain = TorchEngine(path, device, capacity, plain=True)
        self.engine = TorchEngine(path, device, capacity)
        self.step = self.engine.step or self.engine.fixed_step()
        self.best = self.step.way
        self.names = [PLAIN, JOINED]
        self.names += [name for name, way in FIXED.items() if way in (step.PLAIN, *self.step.milliseconds)]
        if self.step.describe()["graph"]:
            self.names.append(GRAPH)

    def choose(self, way: str) -> TorchEngine:
        """The engine, set to decode in a way."""
        if way == PLAIN:
            return self.plain
        self.engine.step = None if way == JOINED else self.step
        self.step.replays = way == GRAPH
        self.step.choose(FIXED.get(way, self.best))
        return self.engine

    def milliseconds(self, way: str, prompt: int, decode: int) -> float:
        """Of a token."""
        return 1000 * self.choose(way).time_once(prompt, (decode,)).decode_s[decode] / decode

    def host_milliseconds(self, way: str, prompt: int, decode: int) -> float:
        """Of a token, until it is queued."""
        engine = self.choose(way)
        engine.prefill(range(1, prompt + 1))
        synchronize(engine.device)
        start = perf_counter()
        engine.decode(decode)
        found = 1000 * (perf_counter() - start) / decode
        synchronize(engine.device)
        return found

    def launches(self, way: str) -> int:
        """Of a token."""
        engine = self.choose(way)
        engine.prefill([1, 2, 3])
        if way == GRAPH:
            return 1
        return sum(launches_of(lambda: engine.decode(1)).values())


def measure(path: Path, device: torch.device, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each way: name, milliseconds, launches, share of the bandwidth, times as fast as the first."""
    ways = Ways(path, device, arguments.prompt + arguments.decode)
    works = {way: partial(ways.milliseconds, way, arguments.prompt, arguments.decode) for way in ways.names}
    times = in_turns(works, arguments.repeats)
    bandwidth = memory_bandwidth(device).bytes_per_second
    footprint = ways.engine.footprint()
    context = arguments.prompt + (arguments.decode + 1) / 2
    moved = footprint.weight_bytes_per_token + footprint.kv_bytes_per_position * context
    return [
        {
            "way": way,
            "ms": Spread.of(found),
            "host_ms": ways.host_milliseconds(way, arguments.prompt, arguments.decode),
            "launches": ways.launches(way),
            "share": moved / bandwidth / (Spread.of(found).median / 1000),
            "speed": Spread.of(times[PLAIN]).median / Spread.of(found).median,
            "engine": ways.engine.describe(),
        }
        for way, found in times.items()
    ]


def main() -> int:
    """Run the command; 2 is a mistake of the user's."""
    parser = parser_of(__doc__, prompt=4, decode=64, repeats=5, device="auto")
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL", help="a GGUF file or a checkpoint")
    arguments = parser.parse_args()
    found = {}
    try:
        device = resolve_device(arguments.device)
        for path in arguments.models:
            found[path.name] = rows = measure(path, device, arguments)
            show(
                f"{path.name} on {device}: {rows[-1]['engine']['step']}",
                "way | ms a token | from, to | as fast | host, ms | launches | of the bandwidth",
                (
                    (
                        row["way"],
                        f"{row['ms'].median:.2f}",
                        span(row["ms"]),
                        f"{row['speed']:.2f} ×",
                        f"{row['host_ms']:.2f}",
                        str(row["launches"]),
                        f"{row['share']:.0%}",
                    )
                    for row in rows
                ),
            )
    except CameraError as error:
        print(error, file=sys.stderr)
        return 2
    save(arguments.json, models=found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
