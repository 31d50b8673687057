"""What it costs to hold sources to what was hashed: hashing, and the comparison that each stage makes.

python benchmarks/held.py [--files 500] [--megabytes 4]
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from camera.held import hold, holding, note, opened


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    begun = time.perf_counter()
    found = work()
    return time.perf_counter() - begun, found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", type=int, default=500)
    parser.add_argument("--megabytes", type=int, default=4)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="camera-held-") as scratch:
        folder, names = Path(scratch), [f"{number:05d}.safetensors" for number in range(asked.files)]
        for name in names:
            (folder / name).write_bytes(os.urandom(1 << 20) * asked.megabytes)
        size = asked.files * asked.megabytes * (1 << 20)
        hashing, held = seconds(lambda: hold(folder, names))
        noting, _ = seconds(lambda: note(folder, names))
        comparing, _ = seconds(held.check)
        plain, _ = seconds(lambda: [open(folder / name, "rb").close() for name in names])
        with holding(held):
            opening, _ = seconds(lambda: [opened(folder / name).close() for name in names])
    print(f"{asked.files} files, {size / 1e9:.1f} GB")
    print(f"hash, once a run         {hashing:8.3f} s  ({size / hashing / 1e9:.1f} GB/s)")
    print(f"note, without hashing    {noting * 1e3:8.1f} ms")
    print(f"compare, twice a stage   {comparing * 1e3:8.1f} ms")
    print(
        f"open and compare         {opening / asked.files * 1e6:8.1f} µs a file ({plain / asked.files * 1e6:.1f} unheld)"
    )


if __name__ == "__main__":
    main()
