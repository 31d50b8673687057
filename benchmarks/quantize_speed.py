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
from camera.formats.quantize import quantize_checkpoint
from camera.options import BlockType, Options, QuantizeOptions

TYPES: tuple[BlockType, ...] = ("q4_0", "q4_0_64")
FASTER_THAN_GGUF = 5.0
COPY_TIMES = 1.5
TENSORS_IN_MEMORY = 2.0
_SAMPLE_S = 0.002


class Timed(Options):
    """Something timed, and what it was compared with."""

    what: str
    seconds: Spread
    input_bytes: int
    against: str = ""
    against_seconds: Spread | None = None
    ratio: float | None = None
    """As the floor is stated: times as fast, or times as long."""
    floor: str = ""
    met: bool | None = None

    def __str__(self) -> str:
        speed = self.input_bytes / self.seconds.median / 1e9
        text = f"{self.what}: {_text(self.seconds)}, {speed:.2f} GB/s of input"
        if self.against_seconds is None:
            return text
        text += f"; {self.against} {_text(self.against_seconds)}"
        return f"{text}; {self.ratio:.2f} ×, floor {self.floor}: {met(self.met)}"


class Memory(Options):
    """How much a step grew the process at most."""

    what: str
    peak_bytes: int
    largest_tensor_bytes: int
    met: bool

    def __str__(self) -> str:
        tensors = self.peak_bytes / self.largest_tensor_bytes
        return (
            f"{self.what}: at most {self.peak_bytes / 2**20:.0f} MiB, {tensors:.2f} of the largest tensor, "
            f"floor ≤ {TENSORS_IN_MEMORY:g}: {met(self.met)}"
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
            results: list[Timed | Memory] = []
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


def _pack(type: BlockType, repeats: int) -> Timed:
    """Packing a matrix of openPangu 7B's feed-forward network, against the library."""
    weight = torch.randn(12_800, 4096, generator=torch.Generator().manual_seed(0)) * 0.02
    array = weight.numpy()
    works = {
        "ours": lambda: blocks.quantize(weight, type),
        "theirs": lambda: gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q4_0),
    }
    ours, theirs = _spreads(works, repeats)
    ratio = theirs.median / ours.median
    return Timed(
        what=f"pack float32 to {type}",
        seconds=ours,
        input_bytes=weight.nbytes,
        against="gguf.quants Q4_0",
        against_seconds=theirs,
        ratio=ratio,
        floor=f"≥ {FASTER_THAN_GGUF:g} × as fast",
        met=ratio >= FASTER_THAN_GGUF,
    )


def _files(checkpoint: Checkpoint, folder: Path, type: BlockType, repeats: int) -> list[Timed]:
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
    ratio = ours.median / copies.median
    return [
        Timed(
            what=f"checkpoint to {type} folder (read, pack, measure the error, write)",
            seconds=quantized,
            input_bytes=input_bytes,
        ),
        Timed(
            what=f"{type} folder to GGUF",
            seconds=ours,
            input_bytes=written.stat().st_size,
            against="copy of the GGUF",
            against_seconds=copies,
            ratio=ratio,
            floor=f"≤ {COPY_TIMES:g} × as long",
            met=ratio <= COPY_TIMES,
        ),
    ]


def _memory(checkpoint: Checkpoint, folder: Path, type: BlockType) -> list[Memory]:
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
        met = growth[0] <= TENSORS_IN_MEMORY * largest
        found.append(Memory(what=what, peak_bytes=growth[0], largest_tensor_bytes=largest, met=met))
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


def _text(seconds: Spread) -> str:
    return f"{seconds.median:.3f} s ({seconds.low:.3f}–{seconds.high:.3f})"


def _random_checkpoint(folder: Path, layers: int) -> Path:
    """A bfloat16 openPangu of random weights, half as wide as the 7B."""
    sizes = {"layers": layers, "hidden": 2048, "ffn": 6400, "vocab": 32_000, "heads": 16, "kv_heads": 16}
    return write_checkpoint(folder, **sizes, dtype=torch.bfloat16)


if __name__ == "__main__":
    raise SystemExit(main())
