"""How fast and in how much memory weights become 4-bit GGUF, against the `gguf` library and a plain copy of the file.

    python benchmarks/quantize_speed.py --json quantize_speed.json

Everything is measured in turns in one run, the order reversed every other turn, and compared by medians. The floors:
packing at 5 times the speed of `gguf.quants` on the same float32 matrix (which has no Q4_0_64: its Q4_0 stands for both);
the GGUF written in 1.5 times what copying as many bytes on the same disk takes, both flushed to the disk; and no more memory
than 2 of the largest tensor, mapped files not counted.
"""

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any

import gguf
import psutil
import torch
from common import clock, in_turns, met, parser_of, save, timed
from synthetic import write_checkpoint

from camera.benchmark.report import Spread
from camera.checkpoints.checkpoint import Checkpoint
from camera.devices import describe_device
from camera.errors import CameraError
from camera.files import sync
from camera.formats import blocks
from camera.formats.convert import convert_to_gguf
from camera.options import BlockType, QuantizeOptions
from camera.quantization.execute import quantize_checkpoint

TYPES: tuple[BlockType, ...] = ("q4_0", "q4_0_64")
FASTER_THAN_GGUF = 5.0
COPY_TIMES = 1.5
TENSORS_IN_MEMORY = 2.0
_SAMPLE_S = 0.002


@dataclass(frozen=True)
class Row:
    """Something measured, and its floor where it has one."""

    what: str
    measured: str
    floor: str = ""
    value: float | None = None
    """As the floor is stated: times as fast, times as long, or of the largest tensor."""
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
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the temporary folder)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    try:
        with tempfile.TemporaryDirectory(prefix="camera-bench-", dir=arguments.folder) as scratch:
            folder = Path(scratch)
            checkpoint = Checkpoint.open(
                arguments.model or _random_checkpoint(folder / "source", arguments.layers)
            )
            _memory(checkpoint, folder, TYPES[0])  # loads what is loaded once
            results: list[Row] = []
            for type in TYPES:
                results += _memory(checkpoint, folder, type)
            results += [_pack(type, arguments.repeats) for type in TYPES]
            for type in TYPES:
                results += _files(checkpoint, folder, type, arguments.repeats)
    except CameraError as error:
        print(error, file=sys.stderr)
        return 2
    machine = describe_device(torch.device("cpu"))["name"]
    print(f"{machine}, {arguments.threads} threads, medians of {arguments.repeats} (smallest–largest)")
    print(*results, sep="\n")
    save(arguments.json, threads=arguments.threads, results=results)
    return 1 if any(result.met is False for result in results) else 0


def _pack(type: BlockType, repeats: int) -> Row:
    """Packing a matrix of openPangu 7B's feed-forward network, against the library."""
    weight = torch.randn(12_800, 4096, generator=torch.Generator().manual_seed(0)) * 0.02
    array = weight.numpy()
    works = {
        "ours": lambda: blocks.quantize(weight, type),
        "theirs": lambda: gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q4_0),
    }
    ours, theirs = _spreads(works, repeats)
    value = theirs.median / ours.median
    text = f"{_text(ours, weight.nbytes)}; gguf.quants Q4_0 {_text(theirs)}"
    floor = f"≥ {FASTER_THAN_GGUF:g} × as fast"
    return Row(f"pack float32 to {type}", text, floor, value, value >= FASTER_THAN_GGUF, ours, theirs)


def _files(checkpoint: Checkpoint, folder: Path, type: BlockType, repeats: int) -> list[Row]:
    """Checkpoint to packed folder, and packed folder to GGUF against a copy of that GGUF."""
    packed, written, copied = folder / "packed", folder / "written.gguf", folder / "copied.gguf"
    input_bytes = sum(info.size_bytes for info in checkpoint.needed.values())

    def quantize() -> None:
        shutil.rmtree(packed, ignore_errors=True)
        quantize_checkpoint(checkpoint, packed, QuantizeOptions(type=type))

    def write() -> None:
        written.unlink(missing_ok=True)
        convert_to_gguf(packed, written, name="speed")

    def copy() -> None:
        copied.unlink(missing_ok=True)
        shutil.copyfile(written, copied)
        sync(copied)

    (quantized,) = _spreads({"quantize": quantize}, repeats)
    ours, copies = _spreads({"write": write, "copy": copy}, repeats)
    value = ours.median / copies.median
    text = f"{_text(ours, written.stat().st_size)}; copy of the GGUF {_text(copies)}"
    what = f"checkpoint to {type} folder (read, pack, measure the error, write)"
    floor = f"≤ {COPY_TIMES:g} × as long"
    return [
        Row(what, _text(quantized, input_bytes), seconds=quantized),
        Row(f"{type} folder to GGUF", text, floor, value, value <= COPY_TIMES, ours, copies),
    ]


def _memory(checkpoint: Checkpoint, folder: Path, type: BlockType) -> list[Row]:
    """Quantising and converting, each with how far the process's own memory grows."""
    packed, written = folder / "packed-for-memory", folder / "for-memory.gguf"
    largest = max(info.size_bytes for info in checkpoint.needed.values())
    steps: dict[str, Callable[[], Any]] = {
        f"quantise to {type}": lambda: quantize_checkpoint(checkpoint, packed, QuantizeOptions(type=type)),
        f"{type} folder to GGUF": lambda: convert_to_gguf(packed, written, name="memory"),
    }
    found = []
    for what, work in steps.items():
        with _peak_growth() as growth:
            work()
        value, text = (
            growth[0] / largest,
            f"at most {growth[0] / 2**20:.0f} MiB, as a share of the largest tensor",
        )
        floor = f"≤ {TENSORS_IN_MEMORY:g}"
        found.append(Row(what, text, floor, value, value <= TENSORS_IN_MEMORY))
    shutil.rmtree(packed)
    written.unlink()
    return found


@contextmanager
def _peak_growth() -> Iterator[list[int]]:
    """A list that holds, after the block, by how many bytes the process grew at most."""
    start, stop = _own_bytes(), Event()
    peak = [0]

    def watch() -> None:
        while not stop.wait(_SAMPLE_S):
            peak[0] = max(peak[0], _own_bytes() - start)

    watcher = Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        stop.set()
        watcher.join()


def _own_bytes() -> int:
    """Resident memory without mapped files, which the system takes back at will; where it is not told, with them."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return int(psutil.Process().memory_info().rss)


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
