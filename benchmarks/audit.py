"""How long `camera audit` takes, against plain hashing of the same bytes: `python benchmarks/audit.py --json audit.json`.

A random checkpoint goes through the real pipeline, tracked by MLflow and versioned by DVC; about 1 GB is published. What
an audit has to read is that, the artifacts in the store and the source. The floor is one sha256 of each of these files,
in threads, by a process that does nothing else. A model of a hundredth of that shows what an audit costs before it
hashes: Python, MLflow, DVC. The three run in turns, from the page cache. To reach: what the size adds is no more than
1.1 times plain hashing. On a machine that others use, only CPU time can be compared.
"""

import argparse
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import (
    TINY_OPENPANGU,
    clock,
    cpu,
    in_turns,
    parser_of,
    printed_by,
    ratio,
    save,
    show,
    span,
    timed_command,
)

from camera.benchmark.report import Spread
from camera.checkpoints.synthetic import write_checkpoint
from camera.files import read_json

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
    parser = parser_of(__doc__, repeats=5)
    parser.add_argument("--folder", type=Path, help="make the models here, or use those that are; kept")
    parser.add_argument("--read", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        sys.stdout.write(f"{read_bytes()}\n")
        return
    with tempfile.TemporaryDirectory(prefix="camera-benchmark-") as name:
        folder = (arguments.folder or Path(name)).resolve()
        for size, shape in SHAPES.items():
            if not (folder / size / PUBLISHED).exists():
                make(folder / size, shape)
        found = measure(folder, arguments.repeats)
    report(found)
    save(arguments.json, **found)


def make(folder: Path, shape: dict[str, int]) -> None:
    """Write a checkpoint, and publish what the pipeline makes of it."""
    source, kv_heads = folder / "source", shape["heads"] // 3
    write_checkpoint(
        source, **shape, kv_heads=kv_heads, vocab=2048, dtype=torch.bfloat16, shard_bytes=512 << 20
    )
    for file in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(TINY_OPENPANGU / file, source)
    (folder / "recipe.yaml").write_text(RECIPE)
    printed_by([sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], folder)
    printed_by([sys.executable, "-m", "camera", "run", "recipe.yaml", "--no-prefect"], folder)


def measure(folder: Path, repeats: int) -> dict[str, Any]:
    """The three in turns; and what one audit reads."""
    large, files = folder / "large", files_to_read(folder / "large")
    audit = [sys.executable, "-m", "camera", "audit", str(PUBLISHED)]
    works = {
        "plain": partial(timed_command, [sys.executable, "-c", PLAIN, *map(str, files)], large),
        "audit": partial(timed_command, audit, large),
        "small": partial(timed_command, audit, folder / "small"),
    }
    times = in_turns(works, repeats)
    published = read_json(large / PUBLISHED / "lineage.json")["files"]
    rows: dict[str, Any] = {
        "bytes": sum(path.stat().st_size for path in files),
        "files": len(files),
        "published_bytes": sum((large / PUBLISHED / name).stat().st_size for name in published),
        "read_bytes": int(printed_by([sys.executable, __file__, "--read"], large)),
        "to_reach": TO_REACH,
    }
    for name, spread in (("clock", clock), ("cpu", cpu)):
        found = {work: spread(taken) for work, taken in times.items()}
        plain, whole, small = (found[work].samples for work in works)
        added = [a - b for a, b in zip(whole, small, strict=True)]
        rows[name] = {**found, "ratio": ratio(whole, plain), "added": ratio(added, plain)}
    return rows


def report(found: dict[str, Any]) -> None:
    """Print the table."""
    size = found["bytes"]
    names = {
        "plain": "sha256 of every file",
        "audit": "camera audit",
        "small": "camera audit, a hundredth of the size",
        "ratio": "audit ÷ sha256",
        "added": "what the size adds ÷ sha256",
    }

    def cells(what: str) -> list[str]:
        on_the_clock, of_cpu = (found[name][what] for name in ("clock", "cpu"))
        speed = f"{size / 1e6 / on_the_clock.median:.0f}" if what in ("plain", "audit") else ""
        return [*_median(on_the_clock), speed, *_median(of_cpu)]

    show(
        f"{found['published_bytes'] / 1e6:.0f} MB published; to read: {size / 1e6:.0f} MB in {found['files']} files; "
        f"an audit reads {found['read_bytes'] / size:.3f} times that",
        "| clock s | spread | MB/s | CPU s | spread",
        ([name, *cells(what)] for what, name in names.items()),
    )
    reached = ", ".join(
        f"{name} {'met' if found[name]['added'].median <= TO_REACH else 'NOT met'}"
        for name in ("clock", "cpu")
    )
    print(f"to reach: what the size adds ≤ {TO_REACH} × sha256: {reached}")


def _median(spread: Spread) -> tuple[str, str]:
    return f"{spread.median:.2f}", span(spread)


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


if __name__ == "__main__":
    main()
