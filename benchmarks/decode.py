"""Time models side by side: prefill and decode in milliseconds per token, as a table and as JSON.

    python benchmarks/decode.py pruned.gguf --baseline unpruned-q4_0.gguf --json decode.json

The protocol and every column: docs/benchmark.md.
"""

import argparse
import logging
import sys
from pathlib import Path

from pydantic import ValidationError

from camera.benchmark.bench import BenchModel, run_benchmark
from camera.benchmark.table import markdown_table
from camera.errors import CameraError
from camera.files import write_json
from camera.options import BenchmarkOptions


def main() -> int:
    """Run the command; 2 is a mistake of the user's, 1 says that nothing could be measured."""
    arguments = _arguments()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    paths = [*([arguments.baseline] if arguments.baseline else []), *arguments.models]
    labels = [path.name for path in paths]
    if len(set(labels)) < len(labels):
        labels = [str(path) for path in paths]
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
        models = [
            BenchModel(label=label, path=path, baseline=path == arguments.baseline)
            for label, path in zip(labels, paths, strict=True)
        ]
        report = run_benchmark(models, options)
        if arguments.json:
            write_json(arguments.json, report.model_dump(mode="json"))
    except (CameraError, ValidationError) as error:
        print(error, file=sys.stderr)
        return 2
    device = report.device
    print(
        f"{device['name']} ({device['device']}, {device['threads']} threads), "
        f"read bandwidth {report.bandwidth_bytes_per_second / 1e9:.1f} GB/s, prompt {options.prompt}\n"
    )
    print(markdown_table(report))
    return 0 if any(row.failure is None for row in report.rows) else 1


def _arguments() -> argparse.Namespace:
    defaults = BenchmarkOptions()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "models", nargs="+", type=Path, metavar="MODEL", help="a GGUF file or a checkpoint folder"
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
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
