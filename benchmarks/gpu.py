"""What an accelerator makes of openPangu-7B's shapes: pruning, decoding, kernels, GPTQ and packing, each against its limit.

    python benchmarks/gpu.py --device cuda --json gpu.json
    python benchmarks/gpu.py --device npu:0 --only decoding kernels --json npu.json
    python benchmarks/gpu.py --device cpu --tiny

Weights are random and the shapes are real (hidden 4096, FFN 12,800, vocabulary 153,376, bf16; `--layers` of them). Each part
runs in a process of its own: what fails is a row that says why, and the others go on. Sized for six minutes on one H100, not
tried there yet, trials of kernels and compilers included; 40 GB of temporary folder. `--tiny` tries the same parts on small
shapes, whose figures mean nothing.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from common import apart, met, parser_of, save, show
from gpu_parts import PARTS, TINY, Job, Row

from camera.devices import (
    describe_device,
    resolve_device,
)
from camera.versions import versions


def main() -> int:
    """Measure, print the table, and write JSON if asked; 1 if a part failed."""
    parser = parser_of(__doc__, device="auto", layers=Job.layers, repeats=Job.repeats)
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=list(PARTS), help="these parts (default: all)"
    )
    parser.add_argument("--tiny", action="store_true", help="small shapes: whether it runs, not how fast")
    parser.add_argument("--folder", type=Path, help="where to put the temporary folder")
    arguments = parser.parse_args()
    job = Job(str(resolve_device(arguments.device)), layers=arguments.layers, repeats=arguments.repeats)
    rows = measure(replace(job, **TINY) if arguments.tiny else job, arguments.only, arguments.folder)
    if arguments.tiny:
        rows = [replace(row, to_reach="", met=None) for row in rows]
    device = describe_device(torch.device(job.device))
    show(
        f"{device['name']}, {'tiny' if arguments.tiny else f'{job.layers} layers of openPangu-7B'} shapes",
        "part | what | measured | unit | to reach | met | note",
        (
            (
                row.part,
                row.what,
                _number(row.value),
                row.unit,
                row.to_reach,
                "" if row.met is None else met(row.met),
                row.note,
            )
            for row in rows
        ),
        left=2,
    )
    save(arguments.json, job=job, accelerator=device, versions=versions(), rows=rows)
    return int(any(row.value is None for row in rows))


def measure(job: Job, parts: Sequence[str], folder: Path | None = None) -> list[Row]:
    """The rows of several parts, each measured in a process and a temporary folder of its own."""
    rows = []
    for part in parts:
        with tempfile.TemporaryDirectory(prefix="camera-gpu-", dir=folder) as scratch:
            rows += apart(_measured, part, job, Path(scratch))
    return rows


def _measured(part: str, job: Job, folder: Path) -> list[Row]:
    try:
        return PARTS[part](job, folder)
    except Exception as error:  # whatever it is, it is the part's result
        return [
            Row(part, type(error).__name__, None, "", note=str(error).splitlines()[0] if str(error) else "")
        ]


def _number(value: float | None) -> str:
    return "failed" if value is None else f"{value:.4g}"


if __name__ == "__main__":
    raise SystemExit(main())
