"""How long `camera audit` takes, against plain hashing of the same bytes: `python benchmarks/audit.py --json audit.json`.

A random checkpoint goes through the real pipeline, tracked by MLflow and versioned by DVC; about 1 GB is published. What
an audit has to read is that, the artifacts in the store and the source. The floor is one sha256 of each of these files,
in threads, by a process that does nothing else. A model of a hundredth of that shows what an audit costs before it
hashes: Python, MLflow, DVC. The three run in turns, from the page cache. To reach: what the size adds is no more than
1.1 times plain hashing. On a machine that others use, only CPU time can be compared.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from synthetic import write_checkpoint

from camera.benchmark.report import Spread
from camera.files import read_json, write_json

REPOSITORY = Path(__file__).resolve().parent.parent
PUBLISHED = Path("published") / "model"
RECIPE = """
name: model
model: source
calibration: {samples: 1, length: 32}
capture: {propagate: one-shot, batch_size: 1, device: cpu}
quantize: {type: q4_0, twin: null}
evaluate: {window: 32, max_windows: 1, device: cpu}
benchmark: {decode: [1], repeats: 1, device: cpu}
"""
SHAPES: dict[str, dict[str, int]] = {
    "large": {"layers": 13, "hidden": 1536, "ffn": 6400, "heads": 12},
    "small": {"layers": 2, "hidden": 384, "ffn": 1600, "heads": 3},
}
PLAIN = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from camera.digests import digest_file
with ThreadPoolExecutor() as pool:
    list(pool.map(digest_file, map(Path, sys.argv[1:])))
"""
TO_REACH = 1.1


def main() -> None:
    """Measure, print a table, and write JSON if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5, help="turns (default: %(default)s)")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        default=REPOSITORY / "data" / "models" / "tiny-openpangu",
        help="a folder that holds tokenizer.model (default: %(default)s)",
    )
    parser.add_argument("--folder", type=Path, help="make the models here, or use those that are; kept")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--read", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        sys.stdout.write(f"{read_bytes()}\n")
        return
    with tempfile.TemporaryDirectory(prefix="camera-benchmark-") as name:
        folder = (arguments.folder or Path(name)).resolve()
        for size, shape in SHAPES.items():
            if not (folder / size / PUBLISHED).exists():
                make(folder / size, shape, arguments.tokenizer)
        found = measure(folder, arguments.repeats)
    show(found)
    if arguments.json:
        write_json(arguments.json, found)


def make(folder: Path, shape: dict[str, int], tokenizer: Path) -> None:
    """Write a checkpoint, and publish what the pipeline makes of it."""
    source = folder / "source"
    write_checkpoint(
        source,
        **shape,
        kv_heads=shape["heads"] // 3,
        vocab=2048,
        positions=2048,
        dtype=torch.bfloat16,
        shard_bytes=512 << 20,
    )
    for file in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(tokenizer / file, source)
    (folder / "recipe.yaml").write_text(RECIPE)
    timed([sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], folder)
    timed([sys.executable, "-m", "camera", "run", "recipe.yaml", "--no-prefect"], folder)


def measure(folder: Path, repeats: int) -> dict[str, Any]:
    """The three in turns, the order reversed every other turn; and what one audit reads."""
    files = files_to_read(folder / "large")
    audit = [sys.executable, "-m", "camera", "audit", str(PUBLISHED)]
    works = {
        "plain": (folder / "large", [sys.executable, "-c", PLAIN, *map(str, files)]),
        "audit": (folder / "large", audit),
        "small": (folder / "small", audit),
    }
    samples: dict[str, list[tuple[float, float]]] = {work: [] for work in works}
    for turn in range(-1, repeats):  # the first warms the page cache
        for work in works if turn % 2 == 0 else reversed(works):
            taken = timed(works[work][1], works[work][0])
            if turn >= 0:
                samples[work].append(taken)
    published = read_json(folder / "large" / PUBLISHED / "lineage.json")["files"]
    rows: dict[str, Any] = {
        "bytes": sum(path.stat().st_size for path in files),
        "files": len(files),
        "published_bytes": sum((folder / "large" / PUBLISHED / name).stat().st_size for name in published),
        "read_bytes": int(answer([sys.executable, __file__, "--read"], folder / "large")),
        "to_reach": TO_REACH,
    }
    for kind, name in enumerate(("clock", "cpu")):
        plain, whole, small = ([taken[kind] for taken in samples[work]] for work in works)
        added = [(a - b) / c for a, b, c in zip(whole, small, plain, strict=True)]
        rows[name] = {
            **{work: Spread.of([taken[kind] for taken in samples[work]]).model_dump() for work in works},
            "ratio": Spread.of([a / c for a, c in zip(whole, plain, strict=True)]).model_dump(),
            "added": Spread.of(added).model_dump(),
        }
    return rows


def show(found: dict[str, Any]) -> None:
    """Print the table."""
    size = found["bytes"]
    title = (
        f"{found['published_bytes'] / 1e6:.0f} MB published; to read: {size / 1e6:.0f} MB in {found['files']} files; "
        f"an audit reads {found['read_bytes'] / size:.3f} times that"
    )
    table = Table(title=title, title_justify="left")
    for column in ("", "clock s", "spread", "MB/s", "CPU s", "spread"):
        table.add_column(column, justify="left" if not column else "right")
    names = {
        "plain": "sha256 of every file",
        "audit": "camera audit",
        "small": "camera audit, a hundredth of the size",
    }
    for work, name in names.items():
        clock, cpu = found["clock"][work], found["cpu"][work]
        speed = "" if work == "small" else f"{size / 1e6 / clock['median']:.0f}"
        table.add_row(name, f"{clock['median']:.2f}", _span(clock), speed, f"{cpu['median']:.2f}", _span(cpu))
    for field, name in (("ratio", "audit ÷ sha256"), ("added", "what the size adds ÷ sha256")):
        clock, cpu = found["clock"][field], found["cpu"][field]
        table.add_row(name, f"{clock['median']:.2f}", _span(clock), "", f"{cpu['median']:.2f}", _span(cpu))
    Console().print(table)
    met = ", ".join(
        f"{name} {'met' if found[kind]['added']['median'] <= TO_REACH else 'NOT met'}"
        for kind, name in (("clock", "clock"), ("cpu", "CPU"))
    )
    Console().print(f"to reach: what the size adds ≤ {TO_REACH} × sha256: {met}")


def _span(spread: dict[str, Any]) -> str:
    return f"{spread['low']:.2f} to {spread['high']:.2f}"


def files_to_read(folder: Path) -> list[Path]:
    """Every file that an audit has to hash, once; the largest first."""
    published = folder / PUBLISHED
    lineage = read_json(published / "lineage.json")
    found = [published / name for name in lineage["files"]]
    for key, entry in lineage["stages"].items():
        artifact = folder / ".camera" / "store" / entry["stage"] / key
        found += [artifact / name for name in read_json(artifact / "manifest.json")["files"]]
    for entry in lineage["sources"].values():
        found += [folder / entry["path"] / name for name in entry["files"]]
    return sorted(dict.fromkeys(found), key=lambda path: -path.stat().st_size)


def read_bytes() -> int:
    """Bytes that one audit reads from files, its imports not counted."""
    from tasks.audit import audit
    from tasks.project import Project
    from tasks.store import Store

    project = Project.here()
    project.configure()
    audit(PUBLISHED, Store(project.store))  # imports what is left
    before = _read_so_far()
    if audit(PUBLISHED, Store(project.store)).all_of("wrong"):
        raise SystemExit("the audit found something wrong")
    return _read_so_far() - before


def _read_so_far() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("rchar")))


def timed(command: list[str], folder: Path) -> tuple[float, float]:
    """Seconds on the clock and of CPU that a command takes, with all that it starts and waits for."""
    before, began = _cpu(), perf_counter()
    answer(command, folder)
    return perf_counter() - began, _cpu() - before


def answer(command: list[str], folder: Path) -> str:
    """What a command prints; ends with its messages if it fails."""
    ours = ("PREFECT_", "MLFLOW_", "CAMERA_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    done = subprocess.run(
        command, cwd=folder, env={**kept, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{command} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
