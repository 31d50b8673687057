"""How fast and in how much memory weights become 4-bit GGUF, against the `gguf` library and a plain copy of the files.

    python benchmarks/quantize_speed.py --json quantize_speed.json
    python benchmarks/quantize_speed.py --model /models/openPangu-7B --device cuda

Everything is measured in turns in one run, the order reversed every other turn, and compared turn by turn. The floors:
packing at 5 times the speed of `gguf.quants` on the same matrix (which has no Q4_0_64: its Q4_0 stands for both, and it takes
float32 alone, so that it converts bf16 first); on an accelerator at 4 GB/s of the matrix, which lies in host memory before and
packed after; the GGUF written in 1.5 times what copying as many bytes on the same disk takes, both flushed to the disk; and no
more than 1 GB of memory for a process, mapped files included, however large a matrix is. On a machine that others use too, the CPU seconds
tell more than the clock; those of packing are of all its threads.
"""

import resource
import shutil
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from common import apart, clock, cpu, in_turns, met, parser_of, ratio, save, span, timed

from camera.benchmark.report import Spread
from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.synthetic import write_checkpoint
from camera.devices import describe_device, resolve_device
from camera.errors import CameraError
from camera.files import sync
from camera.formats import blocks
from camera.formats.convert import convert_to_gguf
from camera.formats.on_device import packs_like_the_cpu
from camera.options import BlockType, QuantizeOptions
from camera.quantization.execute import quantize_checkpoint
from camera.registry import BLOCK_FORMATS

TYPES: tuple[BlockType, ...] = ("q4_0", "q4_0_64")
SHAPES = ((12_800, 4096, torch.float32), (12_800, 4096, torch.bfloat16), (153_376, 4096, torch.bfloat16))
"""Of openPangu 7B: a matrix of the feed-forward network, as either dtype, and the embedding."""
FASTER_THAN_GGUF = 5.0
DEVICE_GB_PER_S = 4.0
COPY_TIMES = 1.5
MEMORY_GB = 1.0


@dataclass(frozen=True)
class Row:
    """Something measured, and its floor where it has one."""

    what: str
    measured: str
    floor: str = ""
    value: float | None = None
    """As the floor is stated: times as fast, GB/s, times as long, or GB."""
    met: bool | None = None
    seconds: Spread | None = None
    against: Spread | None = None

    def __str__(self) -> str:
        text = f"{self.what}: {self.measured}"
        return (
            text if self.value is None else f"{text}; {self.value:.2f}, floor {self.floor}: {met(self.met)}"
        )


def main() -> int:
    """Run the command; 2 is a mistake of the user's, 1 says that a floor was missed."""
    parser = parser_of(__doc__, layers=8, repeats=5, threads=2)
    parser.add_argument("--model", type=Path, help="a checkpoint; the default is one of random weights")
    parser.add_argument("--device", default="cpu", help="also pack there: cuda, npu (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the temporary folder)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    try:
        with tempfile.TemporaryDirectory(prefix="camera-bench-", dir=arguments.folder) as scratch:
            folder = Path(scratch)
            checkpoint = Checkpoint.open(
                arguments.model or _random_checkpoint(folder / "source", arguments.layers)
            )
            results: list[Row] = []
            for type in TYPES:
                results += _memory(checkpoint, folder, type)
            for shape in SHAPES:
                results += _pack(*shape, arguments.repeats)
            if (device := resolve_device(arguments.device)).type != "cpu":
                results += _pack_on_device(device, arguments.repeats)
            for type in TYPES:
                results += _files(checkpoint, folder, type, arguments)
    except CameraError as error:
        print(error, file=sys.stderr)
        return 2
    machine = describe_device(torch.device("cpu"))["name"]
    print(f"{machine}, {arguments.threads} threads, medians of {arguments.repeats} (smallest–largest)")
    print(*results, sep="\n")
    save(arguments.json, threads=arguments.threads, results=results)
    return 1 if any(result.met is False for result in results) else 0


def _pack(rows: int, columns: int, dtype: torch.dtype, repeats: int) -> list[Row]:
    """Packing a matrix that is in memory, against the library."""
    weight = _random_matrix(rows, columns, dtype)
    works: dict[str, Callable[[], Any]] = {type: partial(blocks.quantize, weight, type) for type in TYPES}
    works["gguf"] = partial(_by_gguf, weight)
    times = in_turns({name: partial(timed, work) for name, work in works.items()}, repeats)
    theirs = times.pop("gguf")
    found = []
    for type, ours in times.items():
        faster = ratio([wall for wall, _ in theirs], [wall for wall, _ in ours])
        text = f"{_text(clock(ours), weight.nbytes)}, CPU {_text(cpu(ours))}; gguf.quants Q4_0 {_text(clock(theirs))}, CPU {_text(cpu(theirs))}"
        floor = f"≥ {FASTER_THAN_GGUF:g} × as fast ({span(faster)} by turn)"
        what = f"pack {rows} × {columns} {str(dtype).removeprefix('torch.')} to {type}"
        reached = faster.median >= FASTER_THAN_GGUF
        found.append(Row(what, text, floor, faster.median, reached, clock(ours), clock(theirs)))
    return found


def _pack_on_device(device: torch.device, repeats: int) -> list[Row]:
    """Packing and measuring a matrix on an accelerator, sent there and back."""
    found = []
    for type, (rows, columns, dtype) in product(TYPES, SHAPES):
        weight = _random_matrix(rows, columns, dtype)
        packed = np.empty((rows, BLOCK_FORMATS[type].row_bytes(columns)), np.uint8)

        def put(start: int, data: np.ndarray, packed: np.ndarray = packed) -> None:
            packed[start : start + len(data)] = data

        (spent,) = _spreads({type: partial(blocks.store, weight, type, put, device=device)}, repeats)
        speed = weight.nbytes / spent.median / 1e9
        what = f"pack {rows} × {columns} {str(dtype).removeprefix('torch.')} to {type} on {describe_device(device)['name']}"
        if not packs_like_the_cpu(type, device):
            what += " (on the CPU: the device does not give its bytes)"
        same = bool((packed[:4096] == blocks.quantize(weight[:4096], type)).all())
        floor = f"≥ {DEVICE_GB_PER_S:g} GB/s and the CPU's bytes"
        met_it = same and speed >= DEVICE_GB_PER_S
        found.append(Row(what, _text(spent, weight.nbytes), floor, speed, met_it, spent))
    return found


def _random_matrix(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    some = (torch.randn(min(rows, 4096), columns, generator=generator) * 0.02).to(dtype)
    return some.repeat(-(-rows // len(some)), 1)[:rows]


def _by_gguf(weight: torch.Tensor) -> None:
    for rows in weight.split(12_800):  # as float32 the embedding would take 2.5 GB
        gguf.quants.quantize(rows.float().numpy(), gguf.GGMLQuantizationType.Q4_0)


def _files(checkpoint: Checkpoint, folder: Path, type: BlockType, arguments: Namespace) -> list[Row]:
    """Checkpoint to packed folder against a copy of the checkpoint, and packed folder to GGUF against a copy of that."""
    packed, written, copied = folder / "packed", folder / "written.gguf", folder / "copied.gguf"
    input_bytes = sum(info.size_bytes for info in checkpoint.needed.values())

    def quantize() -> None:
        shutil.rmtree(packed, ignore_errors=True)
        quantize_checkpoint(checkpoint, packed, QuantizeOptions(type=type, device=arguments.device))

    def copy_source() -> None:
        for file in checkpoint.weight_files:
            copied.unlink(missing_ok=True)
            shutil.copyfile(checkpoint.folder / file, copied)
            sync(copied)

    def write() -> None:
        written.unlink(missing_ok=True)
        convert_to_gguf(packed, written, name="speed")

    def copy() -> None:
        copied.unlink(missing_ok=True)
        shutil.copyfile(written, copied)
        sync(copied)

    quantized, copies_of_source = _spreads({"quantize": quantize, "copy": copy_source}, arguments.repeats)
    ours, copies = _spreads({"write": write, "copy": copy}, arguments.repeats)
    value = ours.median / copies.median
    text = f"{_text(ours, written.stat().st_size)}; copy of the GGUF {_text(copies)}"
    what = f"checkpoint to {type} folder (read, pack, measure the error, write, digest)"
    floor = f"≤ {COPY_TIMES:g} × as long"
    return [
        Row(
            what,
            f"{_text(quantized, input_bytes)}; copy of the checkpoint {_text(copies_of_source, input_bytes)}",
            seconds=quantized,
            against=copies_of_source,
        ),
        Row(f"{type} folder to GGUF", text, floor, value, value <= COPY_TIMES, ours, copies),
    ]


def _memory(checkpoint: Checkpoint, folder: Path, type: BlockType) -> list[Row]:
    """Quantising and converting, each in a process of its own."""
    packed, written = folder / "packed-for-memory", folder / "for-memory.gguf"
    found = []
    for what, work, given in (
        (f"quantise to {type}", _peak_of_quantizing, (checkpoint.folder, packed, type)),
        (f"{type} folder to GGUF", _peak_of_converting, (packed, written)),
    ):
        peak = apart(work, *given)
        floor = f"≤ {MEMORY_GB:g} GB"
        found.append(Row(what, "peak of the process (VmHWM)", floor, peak, peak <= MEMORY_GB))
    shutil.rmtree(packed)
    written.unlink()
    return found


def _peak_of_quantizing(source: Path, out: Path, type: BlockType) -> float:
    quantize_checkpoint(Checkpoint.open(source), out, QuantizeOptions(type=type, device="cpu"))
    return _peak_gb()


def _peak_of_converting(packed: Path, out: Path) -> float:
    convert_to_gguf(packed, out, name="memory")
    return _peak_gb()


def _peak_gb() -> float:
    """The most memory that this process has held, mapped files included, in 10^9 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _spreads(works: dict[str, Callable[[], Any]], repeats: int) -> list[Spread]:
    """Seconds of each work, in turns."""
    times = in_turns({name: partial(timed, work) for name, work in works.items()}, repeats)
    return [clock(taken) for taken in times.values()]


def _text(seconds: Spread, input_bytes: int = 0) -> str:
    text = f"{seconds.median:.3f} s ({seconds.low:.3f}–{seconds.high:.3f})"
    return f"{text}, {input_bytes / seconds.median / 1e9:.2f} GB/s of input" if input_bytes else text


def _random_checkpoint(folder: Path, layers: int) -> Path:
    """A bfloat16 openPangu of random weights, half as wide as the 7B."""
    sizes = {"layers": layers, "hidden": 2048, "ffn": 6400, "vocab": 32_000, "heads": 16, "kv_heads": 16}
    return write_checkpoint(folder, **sizes, dtype=torch.bfloat16)


if __name__ == "__main__":
    raise SystemExit(main())
