"""Fuzz the readers with atheris, guided by which lines of ours an input reaches: `make test-fuzz`.

python -m tests.fuzz --seconds 600: every reader in turn, each in a process of its own, in bounded memory.
An input that gets anything but a value or a CameraError is kept as tests/fuzz/corpus/READER/crash-…: mend the reader and
commit the file, which tests/fuzz/test_corpus.py reads from then on.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
MORE_MEMORY_MB = 1024


def fuzz(name: str, seconds: int) -> None:
    """Fuzz one reader; the process ends with atheris's exit code."""
    import atheris

    with atheris.instrument_imports(include=["camera", "tasks"]):
        from camera.errors import CameraError
        from tests.fuzz.targets import TARGETS

    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
    target = TARGETS[name](folder)

    def one(content: bytes) -> None:
        with suppress(CameraError):
            target.read(content)

    found = folder / "corpus"
    found.mkdir()
    (found / "seed").write_bytes(target.seed)
    kept = CORPUS / name
    kept.mkdir(parents=True, exist_ok=True)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    options = [
        f"-max_total_time={seconds}",
        f"-rss_limit_mb={used + MORE_MEMORY_MB}",
        "-timeout=60",
        "-close_fd_mask=1",
        "-print_final_stats=1",
        f"-max_len={2 * len(target.seed) + 4096}",
        f"-artifact_prefix={kept}/",
    ]
    atheris.Setup([sys.argv[0], str(found), str(kept), *options], one)
    atheris.Fuzz()


def main() -> None:
    """Fuzz all readers, or those named; exit code 1 if one failed."""
    from tests.fuzz.names import NAMES

    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--seconds", type=int, default=600, help="for all together")
    parser.add_argument("--here", action="store_true", help="in this process: one name")
    asked = parser.parse_args()
    each = max(1, asked.seconds // len(asked.names))
    if asked.here:
        fuzz(asked.names[0], each)
        return
    failed = []
    for name in asked.names:
        command = [sys.executable, "-m", "tests.fuzz", name, "--seconds", str(each), "--here"]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
        tried = [
            line for line in done.stderr.splitlines() if line.startswith("stat::number_of_executed_units")
        ]
        sys.stdout.write(
            f"{name}: {tried[0].split()[-1] if tried else '?'} inputs, exit code {done.returncode}\n"
        )
        sys.stdout.flush()
        if done.returncode:
            failed.append(name)
            sys.stdout.write("\n".join(done.stderr.splitlines()[-40:]) + "\n")
    sys.exit(f"a reader failed: {', '.join(failed)}; its input is below {CORPUS}" if failed else 0)


main()
