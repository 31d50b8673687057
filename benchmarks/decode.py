"""Time models side by side: prefill and decode in milliseconds per token, as a table and as JSON.

    python benchmarks/decode.py pruned.gguf --baseline unpruned-q4_0.gguf --json decode.json
    python benchmarks/decode.py --synthetic --engine torch llama.cpp --decode 64 --json decode.json

The protocol and every column: docs/benchmark.md. `--synthetic` times random weights in openPangu 7B's layer shapes: unpruned
in 16 bits, in bfloat16 and in float32 (transformers' own forward; only on the torch engine), unpruned in Q4_0, and with 20 %
of the channels pruned in Q4_0_64. To reach: pruned Q4_0_64 as many times as fast as unpruned Q4_0 as fewer bytes are moved,
within 10 %; and against the faster of the two in 16 bits 1.7 times as fast with torch and 2.7 times with llama.cpp.
"""

import argparse
import logging
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from common import met, parser_of
from pydantic import ValidationError

from camera.benchmark.bench import BenchModel, run_benchmark
from camera.benchmark.report import BenchmarkReport, BenchmarkRow
from camera.benchmark.table import markdown_table
from camera.checkpoints.checkpoint import Checkpoint
from camera.checkpoints.synthetic import write_checkpoint
from camera.errors import CameraError
from camera.files import write_json
from camera.formats.convert import convert_to_gguf
from camera.options import BenchmarkOptions, BlockType, QuantizeOptions
from camera.quantization.execute import quantize_checkpoint

HIDDEN, FFN, PRUNED_FFN = 4096, 12_800, 10_240
HEADS, KV_HEADS, POSITIONS = 32, 8, 2048
SIXTEEN_BITS = {"bfloat16": torch.bfloat16, "float32": torch.float32}
BASELINE, PRUNED = "unpruned Q4_0", "pruned Q4_0_64"
WITHIN = 0.1
TIMES_16_BITS = {"torch": 1.7, "llama.cpp": 2.7}


def main() -> int:
    """Run the command; 2 is a mistake of the user's, 1 says that nothing could be measured."""
    arguments = _arguments()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        options = BenchmarkOptions(
            engines=tuple(arguments.engine),
            prompt=arguments.prompt,
            decode=tuple(arguments.decode),
            repeats=arguments.repeats,
            threads=arguments.threads,
            device=arguments.device,
            llama_cpp=arguments.llama_cpp,
            llama_cpp_stock=arguments.llama_cpp_stock,
        )
        with ExitStack() as held:
            if arguments.synthetic:
                scratch = held.enter_context(
                    tempfile.TemporaryDirectory(prefix="camera-bench-", dir=arguments.folder)
                )
                models = synthetic_models(Path(scratch), arguments.layers, arguments.vocab)
            else:
                models = given_models(arguments)
            report = run_benchmark(models, options)
        goals = judge(report) if arguments.synthetic else []
        if arguments.json:
            content = report.model_dump(mode="json")
            write_json(arguments.json, {**content, "goals": goals} if arguments.synthetic else content)
    except (CameraError, ValidationError) as error:
        print(error, file=sys.stderr)
        return 2
    device = report.device
    print(
        f"{device['name']} ({device['device']}, {device['threads']} threads), "
        f"bandwidth {report.bandwidth_bytes_per_second / 1e9:.1f} GB/s, prompt {options.prompt}\n"
    )
    print(markdown_table(report))
    for goal in goals:
        print(f"- {goal['goal']}: {goal['value']:.2f}, to reach {goal['to_reach']}: {met(goal['met'])}")
    return 0 if any(row.failure is None for row in report.rows) and all(goal["met"] for goal in goals) else 1


def given_models(arguments: argparse.Namespace) -> list[BenchModel]:
    """The models of the command line, the baseline first."""
    paths = [*([arguments.baseline] if arguments.baseline else []), *arguments.models]
    labels = [path.name for path in paths]
    if len(set(labels)) < len(labels):
        labels = [str(path) for path in paths]
    return [
        BenchModel(label=label, path=path, baseline=path == arguments.baseline)
        for label, path in zip(labels, paths, strict=True)
    ]


def synthetic_models(folder: Path, layers: int, vocab: int) -> list[BenchModel]:
    """Write the models of `--synthetic` below a folder."""

    def checkpoint(name: str, dtype: torch.dtype, ffn: int = FFN) -> Path:
        sizes = {"layers": layers, "hidden": HIDDEN, "ffn": ffn, "vocab": vocab, "positions": POSITIONS}
        return write_checkpoint(folder / name, **sizes, heads=HEADS, kv_heads=KV_HEADS, dtype=dtype)

    def packed(name: str, source: Path, type: BlockType) -> Path:
        quantize_checkpoint(Checkpoint.open(source), folder / name, QuantizeOptions(type=type))
        convert_to_gguf(folder / name, folder / f"{name}.gguf", name=name)
        return folder / f"{name}.gguf"

    whole = {name: checkpoint(name, dtype) for name, dtype in SIXTEEN_BITS.items()}
    pruned = checkpoint("pruned", torch.bfloat16, PRUNED_FFN)
    return [
        *(
            BenchModel(label=f"unpruned {name}", path=path, engines=("torch",))
            for name, path in whole.items()
        ),
        BenchModel(label=BASELINE, path=packed("q4_0", whole["bfloat16"], "q4_0"), baseline=True),
        BenchModel(label=PRUNED, path=packed("q4_0_64", pruned, "q4_0_64")),
    ]


def judge(report: BenchmarkReport) -> list[dict[str, Any]]:
    """What was to be reached by each engine at each length, and what came out; nothing where a model failed."""
    rows: dict[tuple[str, str, int], BenchmarkRow] = {
        (row.model, row.engine, row.decode): row for row in report.rows if row.failure is None
    }
    goals: list[dict[str, Any]] = []
    for engine in report.options["engines"]:
        for decode in report.options["decode"]:
            baseline, pruned = (rows.get((model, engine, decode)) for model in (BASELINE, PRUNED))
            if baseline is None or pruned is None:
                continue
            assert baseline.bytes_per_token and pruned.bytes_per_token  # noqa: PT018 (measured, both)
            assert pruned.decode_ms and pruned.decode_speedup  # noqa: PT018
            bytes_ratio = baseline.bytes_per_token / pruned.bytes_per_token
            value = pruned.decode_speedup / bytes_ratio
            where = f"{engine}, {decode} tokens: {PRUNED}"
            what = f"{where} {pruned.decode_speedup:.2f} × {BASELINE}, over {bytes_ratio:.2f} × fewer bytes"
            goals.append(_goal(what, value, f"1 ± {WITHIN}", abs(value - 1) <= WITHIN))
            wide = [rows.get((f"unpruned {name}", "torch", decode)) for name in SIXTEEN_BITS]
            times = [row.decode_ms.median for row in wide if row is not None and row.decode_ms is not None]
            if times:
                value, least = min(times) / pruned.decode_ms.median, TIMES_16_BITS[engine]
                what = f"{where} over the faster of 16 bits in torch"
                goals.append(_goal(what, value, f"≥ {least}", value >= least))
    return goals


def _goal(what: str, value: float, to_reach: str, reached: bool) -> dict[str, Any]:
    return {"goal": what, "value": value, "to_reach": to_reach, "met": reached}


def _arguments() -> argparse.Namespace:
    defaults = BenchmarkOptions()
    timing = {"prompt": defaults.prompt, "decode": list(defaults.decode), "repeats": defaults.repeats}
    parser = parser_of(__doc__, layers=2, vocab=1024, device=defaults.device, **timing)
    add = parser.add_argument
    add("models", nargs="*", type=Path, metavar="MODEL", help="a GGUF file or a checkpoint folder")
    add("--synthetic", action="store_true", help="time random weights in openPangu 7B's layer shapes")
    add("--folder", type=Path, help="where --synthetic writes (default: the temporary folder)")
    add("--baseline", type=Path, help="the model that the others are compared with")
    add("--engine", nargs="+", default=defaults.engines, choices=("torch", "llama.cpp"))
    add("--threads", type=int, default=defaults.threads)
    add("--llama-cpp", type=Path, metavar="FOLDER", help="folder that holds llama-bench")
    add("--llama-cpp-stock", type=Path, metavar="FOLDER", help="another, for files without Q4_0_64")
    arguments = parser.parse_args()
    if arguments.synthetic == bool(arguments.models):
        parser.error("give models, or --synthetic")
    return arguments


if __name__ == "__main__":
    raise SystemExit(main())
