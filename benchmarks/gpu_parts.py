"""What benchmarks/gpu.py measures: one function a part, from the shapes and a temporary folder to rows of its table."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import clock, in_turns, random_tokens, timed

from camera.benchmark.bench import BenchModel, run_benchmark
from camera.benchmark.report import BenchmarkRow
from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.synthetic import write_checkpoint
from camera.devices import (
    memory_bandwidth,
    peak_memory_bytes,
    reset_peak_memory,
    synchronize,
)
from camera.engines.parts.blocks import Blocks
from camera.engines.parts.int4_choice import KERNELS
from camera.formats.blocks import quantize
from camera.formats.convert import convert_to_gguf
from camera.loading import load_model
from camera.options import BenchmarkOptions, BlockType, CaptureOptions, PruneOptions, QuantizeOptions
from camera.pruning.execute import decide
from camera.pruning.plan import plan_prune
from camera.pruning.prune_checkpoint import prune_checkpoint
from camera.quantization.execute import quantize_checkpoint

PRUNING, SIXTEEN_BITS, FOUR_BITS, WITHIN = 1.3, 0.75, 0.5, 0.1
WHOLE_LAYERS, GPTQ_MINUTES, ROUNDING_GBS = 34, 3.0, 4.0
_FEW_WORDS = 1024
_ROUNDED_LAYERS = 4
_READ_BYTES = 16 << 20
_CACHE_BYTES = 256 << 20
"""More than any accelerator's last cache: matrices of this size in turn are read from memory."""
_CALLS = 50


@dataclass(frozen=True)
class Job:
    """What to measure, and where."""

    device: str
    layers: int = 16
    hidden: int = 4096
    ffn: int = 12_800
    pruned_ffn: int = 10_240
    heads: int = 32
    kv_heads: int = 8
    vocab: int = 153_376
    samples: int = 128
    length: int = 2048
    batch: int = 8
    decode: int = 256
    repeats: int = 2

    def write(self, folder: Path, ffn: int | None = None) -> Checkpoint:
        """A checkpoint of these shapes."""
        sizes = {"layers": self.layers, "hidden": self.hidden, "ffn": ffn or self.ffn, "vocab": self.vocab}
        heads = {"heads": self.heads, "kv_heads": self.kv_heads}
        return Checkpoint.open(write_checkpoint(folder, **sizes, **heads, dtype=torch.bfloat16))


TINY: dict[str, Any] = {
    "layers": 2,
    "hidden": 128,
    "ffn": 320,
    "pruned_ffn": 256,
    "heads": 4,
    "kv_heads": 2,
    "vocab": 320,
}
TINY |= {"samples": 8, "length": 32, "decode": 8}


@dataclass(frozen=True)
class Row:
    """One figure."""

    part: str
    what: str
    value: float | None
    unit: str
    to_reach: str = ""
    met: bool | None = None
    note: str = ""


def pruning(job: Job, folder: Path) -> list[Row]:
    """`prune_checkpoint` against a plain forward pass and reading the source once."""
    device = torch.device(job.device)
    checkpoint = job.write(folder / "source")
    tokens_ST = random_tokens(job.vocab, job.samples, job.length)
    decoder = load_model(checkpoint.folder, "auto", job.device).get_decoder()

    def plain() -> None:
        with torch.inference_mode():
            for batch_BT in tokens_ST.split(job.batch):
                decoder(batch_BT.to(device), use_cache=False)
        synchronize(device)

    def read() -> None:
        room = memoryview(bytearray(_READ_BYTES))
        for name in checkpoint.weight_files:
            with (checkpoint.folder / name).open("rb", buffering=0) as file:
                while file.readinto(room):
                    pass

    def prune(propagate: str) -> None:
        shutil.rmtree(folder / "pruned", ignore_errors=True)
        capture = CaptureOptions(propagate=propagate, batch_size=job.batch, device=job.device)  # type: ignore[arg-type]
        prune_checkpoint(checkpoint, tokens_ST, folder / "pruned", capture, PruneOptions(ratio=0.2))

    works: dict[str, Callable[[], None]] = {"plain": plain, "read": read}
    works |= {way: lambda way=way: prune(way) for way in ("one-shot", "sequential")}  # type: ignore[misc]
    times = in_turns({name: lambda work=work: timed(work) for name, work in works.items()}, job.repeats)  # type: ignore[misc]
    seconds = {name: clock(found).median for name, found in times.items()}
    floor = seconds["plain"] + seconds["read"]
    reset_peak_memory(device)
    prune("sequential")
    rows = [Row("pruning", name, value, "s") for name, value in seconds.items()]
    for way in ("one-shot", "sequential"):
        quotient = seconds[way] / floor
        rows.append(
            Row("pruning", f"{way} over plain + read", quotient, "×", f"≤ {PRUNING}", quotient <= PRUNING)
        )
    rows.append(Row("pruning", "peak memory with the plain model", peak_memory_bytes(device) / 1e9, "GB"))
    return [*rows, *same_channels(job, folder)]


def same_channels(job: Job, folder: Path) -> list[Row]:
    """The share of channels that the device and the CPU both keep, of a small model in float32."""
    sizes = {"layers": 4, "hidden": 256, "ffn": 1024, "vocab": 512, "heads": 4, "kv_heads": 2}
    checkpoint = Checkpoint.open(write_checkpoint(folder / "small", **sizes, dtype=torch.float32))
    tokens_ST = random_tokens(sizes["vocab"], 16, 64)
    rows = []
    for method in ("camera", "obs"):
        kept: list[set[tuple[int, str, int]]] = []
        for device in (job.device, "cpu"):
            options = CaptureOptions(device=device, dtype="float32")
            plan = plan_prune(checkpoint, options, PruneOptions(ratio=0.4, multiple_of=1, method=method))
            work = folder / f"{method}-{device.replace(':', '-')}-{len(kept)}"
            work.mkdir()
            layers = list(decide(checkpoint, tokens_ST, plan, options, work))
            kept.append(
                {
                    (layer.layer, block.label, int(channel))
                    for layer in layers
                    for block in layer.blocks
                    for channel in block.kept_K
                }
            )
        share = len(kept[0] & kept[1]) / len(kept[1])
        rows.append(Row("pruning", f"channels as on the CPU, {method}", 100 * share, "%", "100", share == 1))
    return rows


def decoding(job: Job, folder: Path) -> list[Row]:
    """The torch engine's decode step against the bytes that it moves."""

    def packed(source: Checkpoint, type: BlockType) -> Path:
        quantize_checkpoint(source, folder / type, QuantizeOptions(type=type, device=job.device))
        convert_to_gguf(folder / type, folder / f"{type}.gguf", name=type)
        shutil.rmtree(folder / type)
        return folder / f"{type}.gguf"

    whole, narrow = job.write(folder / "whole"), job.write(folder / "narrow", job.pruned_ffn)
    models = [
        BenchModel(label="bf16", path=whole.folder),
        BenchModel(label="Q4_0", path=packed(whole, "q4_0"), baseline=True),
        BenchModel(label="pruned Q4_0_64", path=packed(narrow, "q4_0_64")),
    ]
    options = BenchmarkOptions(
        engines=("torch",), decode=(job.decode,), repeats=job.repeats, device=job.device
    )
    report = run_benchmark(models, options)
    found: dict[str, BenchmarkRow] = {row.model: row for row in report.rows}
    rows = [Row("decoding", "bandwidth", report.bandwidth_bytes_per_second / 1e9, "GB/s")]
    for model, row in found.items():
        if row.failure is not None or row.decode_ms is None:
            rows.append(Row("decoding", model, None, "", note=row.failure or "not measured"))
            continue
        least = SIXTEEN_BITS if model == "bf16" else FOUR_BITS
        share = row.bandwidth_share or 0.0
        how = str(report.engines[f"torch: {model}"])
        rows.append(Row("decoding", f"{model}, a token", row.decode_ms.median, "ms", note=how))
        rows.append(
            Row(
                "decoding",
                f"{model}, of the bandwidth",
                100 * share,
                "%",
                f"≥ {100 * least:.0f}",
                share >= least,
            )
        )
    baseline, pruned = found["Q4_0"], found["pruned Q4_0_64"]
    if baseline.bytes_per_token and pruned.bytes_per_token and pruned.decode_speedup:
        share = pruned.decode_speedup * pruned.bytes_per_token / baseline.bytes_per_token
        rows.append(
            Row(
                "decoding",
                "pruned over unpruned, over the bytes' ratio",
                share,
                "×",
                f"1 ± {WITHIN}",
                abs(share - 1) <= WITHIN,
            )
        )
    return rows


def kernels(job: Job, folder: Path) -> list[Row]:
    """One token through one matrix: 16 bits and every 4-bit kernel that takes its shape."""
    device = torch.device(job.device)
    limit = memory_bandwidth(device).bytes_per_second
    query_key_value = job.hidden + 2 * job.hidden * job.kv_heads // job.heads
    shapes = {
        "qkv": (query_key_value, job.hidden),
        "out": (job.hidden, job.hidden),
        "gate and up": (2 * job.ffn, job.hidden),
    }
    shapes |= {"down": (job.hidden, job.ffn), "head": (job.vocab, job.hidden)}
    rows = []
    for name, (height, width) in shapes.items():
        weight_NK = torch.randn((height, width), generator=torch.Generator().manual_seed(0))
        x_1K = torch.randn((1, width), device=device).bfloat16()
        copies = _copies(2 * weight_NK.numel())
        wide = [weight_NK.to(device, torch.bfloat16, copy=True) for _ in range(copies)]
        calls = [partial(F.linear, x_1K, matrix) for matrix in wide]
        rows.append(_kernel_row(f"{name}, bf16", device, calls, wide[0].nbytes, limit))
        del wide, calls
        for type in ("q4_0", "q4_0_64"):
            packed = quantize(weight_NK, type)
            blocks = Blocks(type, packed)
            for kind in KERNELS[device.type]:
                if kind.why_not(blocks.rows, blocks.columns, blocks.group):
                    continue
                linears = [kind(blocks, None, device) for _ in range(_copies(packed.nbytes))]
                x = x_1K.to(kind.dtype)
                calls = [partial(linear, x) for linear in linears]
                moved = sum(buffer.nbytes for buffer in linears[0].buffers())
                rows.append(_kernel_row(f"{name}, {type}, {kind.kernel}", device, calls, moved, limit))
    return rows


def _copies(size: int) -> int:
    """So many matrices of a size that no cache holds them all, where as many calls can tell."""
    return min(_CALLS, _CACHE_BYTES // size + 1)


def _kernel_row(
    what: str, device: torch.device, calls: Sequence[Callable[[], Any]], moved: int, limit: float
) -> Row:
    seconds = _seconds_of_a_call(device, calls)
    return Row(
        "kernels",
        what,
        moved / seconds / 1e9,
        "GB/s",
        note=f"{seconds * 1e6:.1f} µs, {moved / seconds / limit:.0%} of the bandwidth",
    )


@torch.inference_mode()
def _seconds_of_a_call(device: torch.device, calls: Sequence[Callable[[], Any]]) -> float:
    """Of several calls in turn, queued together: as a captured graph where the device has them, so that Python counts for nothing."""

    def run() -> None:
        for number in range(_CALLS):
            calls[number % len(calls)]()

    run()
    synchronize(device)
    replay = run
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        replay = graph.replay

    def once() -> None:
        replay()
        synchronize(device)

    once()
    return min(timed(once)[0] for _ in range(5)) / _CALLS


def gptq(job: Job, folder: Path) -> list[Row]:
    """All matrices of one decoder layer."""
    checkpoint = replace(job, layers=1, vocab=_FEW_WORDS).write(folder / "source")
    tokens_ST = random_tokens(_FEW_WORDS, job.samples, job.length)
    options = QuantizeOptions(method="gptq", device=job.device, batch_size=job.batch)
    times = [
        timed(lambda turn=turn: quantize_checkpoint(checkpoint, folder / f"{turn}", options, tokens_ST))  # type: ignore[misc]
        for turn in range(2)  # the first loads kernels
    ]
    seconds = times[-1][0]
    minutes = WHOLE_LAYERS * seconds / 60
    return [
        Row("gptq", "a layer", seconds, "s", note=f"{job.samples} × {job.length} tokens"),
        Row("gptq", f"{WHOLE_LAYERS} layers", minutes, "min", f"≤ {GPTQ_MINUTES}", minutes <= GPTQ_MINUTES),
    ]


def rounding(job: Job, folder: Path) -> list[Row]:
    """Rounding to the nearest, from disk to disk; what packs on the host cannot be faster than its cores."""
    checkpoint = replace(job, layers=min(job.layers, _ROUNDED_LAYERS)).write(folder / "source")
    size = sum((checkpoint.folder / name).stat().st_size for name in checkpoint.weight_files)
    rows = []
    for type in ("q4_0", "q4_0_64"):
        for device in dict.fromkeys((job.device, "cpu")):
            out = folder / "packed"

            def work(type: BlockType = type, device: str = device, out: Path = out) -> None:
                shutil.rmtree(out, ignore_errors=True)
                quantize_checkpoint(checkpoint, out, QuantizeOptions(type=type, device=device))

            speed = size / clock(in_turns({"": lambda work=work: timed(work)}, job.repeats)[""]).median / 1e9  # type: ignore[misc]
            goal = () if device == "cpu" else (f"≥ {ROUNDING_GBS}", speed >= ROUNDING_GBS)
            rows.append(Row("rounding", f"{type}, {device}", speed, "GB/s", *goal))
    return rows


PARTS: dict[str, Callable[[Job, Path], list[Row]]] = {
    "pruning": pruning,
    "decoding": decoding,
    "kernels": kernels,
    "gptq": gptq,
    "rounding": rounding,
}
