"""A build of llama.cpp: where it lies, what tells it from another, and running its programs, each in a process that ends by itself."""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import psutil

from camera.digests import digest_file, digest_json
from camera.engines.parts import xllama
from camera.errors import CameraError

BINARY = "llama-bench"
_BELOW = (".", "bin", "build/bin")
"""Where in a folder the binary lies: beside the user's files, in an install, or in a source tree."""
_POLL_S = 0.2
_WHEEL = "xllamacpp"
"""The package of the extra `llama`."""


@dataclass(frozen=True)
class Ran:
    """A process that has ended well."""

    output: str
    errors: str
    """What it wrote to standard error."""
    peak_bytes: int
    """The most resident memory that was seen."""


@dataclass(frozen=True)
class LlamaBuild:
    """A program that takes llama-bench's flags and prints its JSON, and what lies beside it."""

    command: tuple[str, ...]
    """What to start, to which the flags are added."""
    name: str
    """For people: the binary's path, or the wheel and its version."""

    def beside(self, program: str) -> str | None:
        """Path of another program of the same build, if it is there."""
        path = Path(self.command[0]).with_name(program)
        is_there = len(self.command) == 1 and path.is_file() and os.access(path, os.X_OK)
        return str(path) if is_there else None

    def tests(self, output: str) -> list[dict[str, Any]]:
        """The entries of llama-bench's JSON, at least one, with the build's backends in each.

        Raises:
            CameraError: if it is something else.
        """
        try:
            tests: list[dict[str, Any]] = json.loads(output)
            if all("backends" in test for test in tests) and tests:
                return tests
        except (json.JSONDecodeError, TypeError):
            pass
        raise CameraError(
            f"{self.name} -o json printed something else: {output[:200]!r}; is this llama.cpp's {BINARY}?"
        )

    def digest(self) -> str:
        """What tells one build from another: the wheel's name and version, or the sha256 over the binary and the libraries
        beside it, which is where the code of a shared build is."""
        if len(self.command) > 1:
            return self.name
        binary = Path(self.command[0]).resolve()
        libraries = (
            path
            for below in ("", "../lib")
            for path in (binary.parent / below).glob("lib*")
            if path.is_file()
        )
        files = {path.resolve() for path in (binary, *libraries)}
        return digest_json(sorted([path.name, digest_file(path)] for path in files))


def find_build(folder: Path | None, option: str = "llama_cpp") -> LlamaBuild:
    """The binary from a folder, else from $LLAMA_CPP_DIR, else from PATH; else the build in the extra `llama`.

    Args:
        folder: what the option says.
        option: its name, for messages.

    Raises:
        CameraError: if there is none, or a folder that is named has none; says where it was looked for.
    """
    named = folder or os.environ.get("LLAMA_CPP_DIR")
    if named:
        for below in _BELOW:
            path = Path(named) / below / BINARY
            if path.is_file() and os.access(path, os.X_OK):
                return LlamaBuild((str(path),), str(path))
        raise CameraError(
            f"{option}: {named} holds no {BINARY} (nor do its bin/ and build/bin/): build llama.cpp there, or name "
            "another folder"
        )
    if found := shutil.which(BINARY):
        return LlamaBuild((found,), found)
    if importlib.util.find_spec(_WHEEL) is not None:
        # -P: the script's folder stays off the path, where its neighbours' names could hide other modules.
        command = (sys.executable, "-P", xllama.__file__)
        return LlamaBuild(command, f"{_WHEEL} {importlib.metadata.version(_WHEEL)}")
    raise CameraError(
        f"llama.cpp: {BINARY} is not on PATH, nor is the extra `llama` installed: `pip install 'camera-npu[llama]'`, "
        "or set `llama_cpp` or $LLAMA_CPP_DIR to the folder of a build"
    )


def run(command: Sequence[str], about: str, timeout: float) -> Ran:
    """What a process wrote that ended by itself; its whole process group is killed if it does not.

    Args:
        command: program and arguments.
        about: program and model, for messages.
        timeout: seconds.

    Raises:
        CameraError: if it takes longer, or fails, with the last lines that it wrote.
    """
    peak = 0
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        deadline = monotonic() + timeout
        try:
            while True:
                try:
                    wait = min(_POLL_S, max(0, deadline - monotonic()))
                    output, errors = process.communicate(timeout=wait)
                    break
                except subprocess.TimeoutExpired:
                    peak = max(peak, _resident_bytes(process.pid))
                    if monotonic() >= deadline:
                        raise CameraError(f"{about} was ended after {timeout:g} s") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode != 0:
        last = "\n".join(errors.strip().splitlines()[-5:]) or "it said nothing"
        raise CameraError(f"{about} failed with exit code {process.returncode}: {last}")
    return Ran(output, errors, peak)


def _resident_bytes(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:  # it has just ended
        return 0
