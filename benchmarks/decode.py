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
from pydantic import ValidationError
from synthetic import write_checkpoint, write_tokenizer

from camera.benchmark.bench import BenchModel, run_benchmark
from camera.benchmark.report import BenchmarkReport, BenchmarkRow
from camera.benchmark.table import markdown_table
from camera.checkpoints.checkpoint import Checkpoint
from camera.errors import CameraError
from camera.files import write_json
from camera.formats.convert import convert_to_gguf
from camera.formats.quantize import quantize_checkpoint
from camera.options import BenchmarkOptions, BlockType, QuantizeOptions

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
            llama_cpp_reads_q4_0_64=arguments.llama_cpp_reads_q4_0_64,
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
        f"read bandwidth {report.bandwidth_bytes_per_second / 1e9:.1f} GB/s, prompt {options.prompt}\n"
    )
    print(markdown_table(report))
    for goal in goals:
        print(
            f"- {goal['goal']}: {goal['value']:.2f}, to reach {goal['to_reach']}: {'met' if goal['met'] else 'MISSED'}"
        )
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
        sizes: dict[str, Any] = {
            "layers": layers,
            "hidden": HIDDEN,
            "ffn": ffn,
            "vocab": vocab,
            "heads": HEADS,
        }
        out = write_checkpoint(folder / name, **sizes, kv_heads=KV_HEADS, positions=POSITIONS, dtype=dtype)
        write_tokenizer(out)
        return out

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
    goals: list[dict[str, Any]] = []

    def find(model: str, engine: str, decode: int) -> BenchmarkRow | None:
        rows = (row for row in report.rows if (row.model, row.engine, row.decode) == (model, engine, decode))
        return next((row for row in rows if row.failure is None), None)

    for engine in report.options.engines:
        for decode in report.options.decode:
            baseline, pruned = find(BASELINE, engine, decode), find(PRUNED, engine, decode)
            if baseline is None or pruned is None:
                continue
            assert baseline.bytes_per_token is not None
            assert pruned.bytes_per_token is not None
            assert pruned.decode_ms is not None
            assert pruned.decode_speedup is not None
            bytes_ratio = baseline.bytes_per_token / pruned.bytes_per_token
            value = pruned.decode_speedup / bytes_ratio
            what = f"{engine}, {decode} tokens: {PRUNED} {pruned.decode_speedup:.2f} × {BASELINE}"
            goals.append(
                {
                    "goal": f"{what}, over {bytes_ratio:.2f} × fewer bytes",
                    "value": value,
                    "to_reach": f"1 ± {WITHIN}",
                    "met": abs(value - 1) <= WITHIN,
                }
            )
            wide = [find(f"unpruned {name}", "torch", decode) for name in SIXTEEN_BITS]
            times = [row.decode_ms.median for row in wide if row is not None and row.decode_ms is not None]
            if times:
                value = min(times) / pruned.decode_ms.median
                goals.append(
                    {
                        "goal": f"{engine}, {decode} tokens: {PRUNED} over the faster of 16 bits in torch",
                        "value": value,
                        "to_reach": f"≥ {TIMES_16_BITS[engine]}",
                        "met": value >= TIMES_16_BITS[engine],
                    }
                )
    return goals


def _arguments() -> argparse.Namespace:
    defaults = BenchmarkOptions()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "models", nargs="*", type=Path, metavar="MODEL", help="a GGUF file or a checkpoint folder"
    )
    parser.add_argument(
        "--synthetic", action="store_true", help="time random weights in openPangu 7B's layer shapes"
    )
    parser.add_argument("--layers", type=int, default=2, help="of --synthetic (default: %(default)s)")
    parser.add_argument("--vocab", type=int, default=1024, help="of --synthetic (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, help="where --synthetic writes; the default is the temporary folder"
    )
    parser.add_argument("--baseline", type=Path, help="the model that the others are compared with")
    parser.add_argument(
        "--json", type=Path, metavar="OUT", help="also write everything measured to this file"
    )
    parser.add_argument("--engine", nargs="+", default=defaults.engines, choices=("torch", "llama.cpp"))
    parser.add_argument("--prompt", type=int, default=defaults.prompt)
    parser.add_argument("--decode", type=int, nargs="+", default=defaults.decode)
    parser.add_argument("--repeats", type=int, default=defaults.repeats)
    parser.add_argument("--threads", type=int, default=defaults.threads)
    parser.add_argument("--device", default=defaults.device)
    parser.add_argument("--llama-cpp", type=Path, metavar="FOLDER", help="folder that holds llama-bench")
    parser.add_argument("--llama-cpp-reads-q4-0-64", action="store_true", help="this build defines Q4_0_64")
    arguments = parser.parse_args()
    if arguments.synthetic == bool(arguments.models):
        parser.error("give models, or --synthetic")
    return arguments


if __name__ == "__main__":
    raise SystemExit(main())
