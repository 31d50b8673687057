"""The command line in a process of its own that is forked from one with torch and transformers in it: a second saved each."""

import atexit
import multiprocessing
import os
import subprocess
import sys
import tempfile
import traceback
from multiprocessing import forkserver
from pathlib import Path

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    [
        *("tests.faults.work", "transformers.generation.utils", "transformers.models.llama.modeling_llama"),
        *("safetensors.torch", "gguf", "typer", "rich.console", "tests.forked"),
    ]
)
"""Nothing that reads an environment variable of ours as it is imported."""


def start_server() -> None:
    """Start the process to fork from, before the product starts one for itself with fewer libraries in it.

    Without a standard error: ranks that are to fail would write theirs between the results of the tests.
    """
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        forkserver.ensure_running()
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def run_forked(
    arguments: tuple[str, ...], folder: Path, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run `camera` to its end in a folder, with these environment variables alone."""
    with tempfile.TemporaryDirectory() as scratch:
        printed = [Path(scratch) / "stdout", Path(scratch) / "stderr"]
        process = FORKED.Process(target=_run, args=(arguments, folder, environment, printed))
        process.start()
        process.join()
        out, err = (path.read_text(encoding="utf-8") for path in printed)
    assert process.exitcode is not None
    return subprocess.CompletedProcess(["camera", *arguments], process.exitcode, out, err)


def _run(arguments: tuple[str, ...], folder: Path, environment: dict[str, str], printed: list[Path]) -> None:
    for number, path in enumerate(printed, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["camera", *arguments]
    from camera.cli import main

    try:
        main()
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None
    finally:
        atexit._run_exitfuncs()  # a child of multiprocessing ends without
