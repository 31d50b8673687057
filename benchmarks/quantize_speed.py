"""How fast and in how much memory weights become 4-bit GGUF, against the `gguf` library and a plain copy of the file.

    python benchmarks/quantize_speed.py --json quantize_speed.json

Everything is measured in turns in one run, the order reversed every other turn, and compared by medians. The floors:
packing at 5 times the speed of `gguf.quants` on the same float32 matrix (which has no Q4_0_64: its Q4_0 stands for both);
the GGUF written in 1.5 times what copying as many bytes on the same disk takes, both flushed to the disk; and no more memory
than 2 of the largest tensor, mapped files not counted.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from time import perf_counter
from typing import Any

import gguf
import psutil
import torch
from synthetic import write_tokenizer

from camera.benchmark.report import Spread
from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.safetensors_file import write_tensors
from camera.devices import describe_device
from camera.errors import CameraError
from camera.files import sync, write_json
from camera.formats import blocks
from camera.formats.convert import convert_to_gguf
from camera.formats.quantize import quantize_checkpoint
from camera.options import BlockType, Options, QuantizeOptions

TYPES: tuple[BlockType, ...] = ("q4_0", "q4_0_64")
FASTER_THAN_GGUF = 5.0
COPY_TIMES = 1.5
TENSORS_IN_MEMORY = 2.0
_SAMPLE_S = 0.002
_NORMS = ("input", "post_attention")


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
        return f"{text}; {self.ratio:.2f} ×, floor {self.floor}: {_verdict(self.met)}"


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
            f"floor ≤ {TENSORS_IN_MEMORY:g}: {_verdict(self.met)}"
        )


def main() -> int:
    """Run the command; 2 is a mistake of the user's, 1 says that a floor was missed."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    try:
        with tempfile.TemporaryDirectory(prefix="camera-bench-", dir=arguments.folder) as scratch:
            folder = Path(scratch)
            source = arguments.model or _random_checkpoint(folder / "source", arguments.layers)
            checkpoint = Checkpoint.open(source)
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
    machine = describe_device(torch.device("cpu"))
    heading = (
        f"{machine['name']}, {arguments.threads} threads, medians of {arguments.repeats} (smallest–largest)"
    )
    print(heading, *results, sep="\n")
    if arguments.json:
        lines = [result.model_dump(mode="json") for result in results]
        write_json(arguments.json, {"machine": machine, "threads": arguments.threads, "results": lines})
    return 1 if any(result.met is False for result in results) else 0


def _pack(type: BlockType, repeats: int) -> Timed:
    """Packing a matrix of openPangu 7B's feed-forward network, against the library."""
    weight = torch.randn(12_800, 4096, generator=torch.Generator().manual_seed(0)) * 0.02
    array = weight.numpy()
    ours, theirs = _in_turns(
        lambda: blocks.quantize(weight, type),
        lambda: gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q4_0),
        repeats,
    )
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

    quantized = Spread.of([_seconds(quantize) for _ in range(repeats)])
    write()
    ours, copies = _in_turns(write, copy, repeats)
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


def _in_turns(first: Callable[[], Any], second: Callable[[], Any], repeats: int) -> tuple[Spread, Spread]:
    """Seconds of both, after one run of each that is not counted."""
    works = (first, second)
    samples: tuple[list[float], list[float]] = ([], [])
    for work in works:
        work()
    for turn in range(repeats):
        for index in (0, 1) if turn % 2 == 0 else (1, 0):
            samples[index].append(_seconds(works[index]))
    return Spread.of(samples[0]), Spread.of(samples[1])


def _seconds(work: Callable[[], Any]) -> float:
    start = perf_counter()
    work()
    return perf_counter() - start


def _text(seconds: Spread) -> str:
    return f"{seconds.median:.3f} s ({seconds.low:.3f}–{seconds.high:.3f})"


def _verdict(met: bool | None) -> str:
    return "met" if met else "MISSED"


def _random_checkpoint(folder: Path, layers: int) -> Path:
    """A bfloat16 openPangu of random weights, half as wide as the 7B, with a tokenizer of single bytes."""
    hidden, ffn, vocab = 2048, 6400, 32_000
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "lm_head.weight": (vocab, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{prefix}mlp.{name}_proj.weight": (ffn, hidden) for name in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj.weight"] = (hidden, ffn)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: (torch.randn(shape, generator=generator) * 0.02).bfloat16() for name, shape in shapes.items()
    }
    biases = [
        f"model.layers.{layer}.self_attn.{name}_proj.bias" for layer in range(layers) for name in "qkvo"
    ]
    norms = [f"model.layers.{layer}.{name}_layernorm.weight" for layer in range(layers) for name in _NORMS]
    tensors |= {
        name: torch.ones(hidden, dtype=torch.bfloat16) for name in (*biases, *norms, "model.norm.weight")
    }
    folder.mkdir()
    write_tensors(folder / "model.safetensors", tensors)
    config = {
        "architectures": ["PanguEmbeddedForCausalLM"],
        "model_type": "PanguEmbedded",
        "bias": True,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 128,
        "num_key_value_heads": hidden // 128,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "vocab_size": vocab,
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
    }
    write_json(folder / "config.json", config)
    write_tokenizer(folder)
    return folder


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model", type=Path, help="a checkpoint folder; the default is one of random weights"
    )
    parser.add_argument("--layers", type=int, default=8, help="decoder layers of the random one")
    parser.add_argument(
        "--folder", type=Path, help="on the disk to measure; the default is the temporary folder"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--json", type=Path, metavar="OUT", help="also write everything measured to this file"
    )
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
