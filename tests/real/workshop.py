"""Commands run in processes of their own, measured, each once; what they make is kept while another one needs it."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from tests.real.commands import COMMANDS

_LIMIT_S = 1800
_OURS = ("PREFECT_", "MLFLOW_", "CAMERA_")
_TAIL = 4000


@dataclass(frozen=True)
class Done:
    """A command that has run."""

    name: str
    command: str
    out: Path
    code: int
    printed: str
    """Its standard output."""
    log: str
    """The end of what it wrote to standard error."""
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    """VmHWM of its largest process."""
    bound_bytes: float

    @property
    def json(self) -> Any:
        """What `--json` printed."""
        return json.loads(self.printed)


class Workshop:
    """A folder with the checkpoint, in which commands run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done: dict[str, Done] = {}

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def path(self, name: str) -> Path:
        """Of what a command makes."""
        if name == "twin":
            return self.folder / "convert-q4_0-twin.gguf"
        return self.folder / (name + (COMMANDS[name].makes if name in COMMANDS else ""))

    @contextmanager
    def using(self) -> Iterator[None]:
        """What is made meanwhile goes at the end, unless a command that has not run yet reads it."""
        try:
            yield
        finally:
            waited = {use for name, each in COMMANDS.items() if name not in self.done for use in each.uses}
            for name in self.done.keys() - waited:
                for path in (self.path(name), *([self.path("twin")] if name == "convert" else [])):
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def run(self, name: str) -> Done:
        """What a command made, which runs now unless it has; the test fails with the end of its output if it failed."""
        if name not in self.done or not (self.done[name].code or self._is_there(name)):
            self.done[name] = self._run(name)
        done = self.done[name]
        assert done.code == 0, f"{done.command}\nended with {done.code}:\n{done.printed[-_TAIL:]}\n{done.log}"
        return done

    def measured(self, name: str) -> Done:
        """What a command took, which runs now unless it has; its output may be gone."""
        return self.done[name] if name in self.done else self.run(name)

    def arguments(self, name: str) -> list[str]:
        """Of a command, with paths in the place of names."""
        command = COMMANDS[name]
        for needed in command.needs:
            if find_spec(needed) is None:
                pytest.skip(f"{needed} is not installed")
        places = {use: self.run(use).out for use in command.uses}
        places |= {"out": self.path(name), "model": self.model, "folder": self.folder}
        if "convert" in places:
            places["twin"] = self.path("twin")
        return [word.format(**places) for word in command.words]

    def environment(self) -> dict[str, str]:
        """Of a command: nothing of ours, all cores unless CAMERA_REAL_THREADS says how many."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_OURS)}
        threads = os.environ.get("CAMERA_REAL_THREADS", str(os.cpu_count()))
        return {
            **kept,
            **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), threads),
            **{"PYTHONPATH": str(REPOSITORY), "COLUMNS": "160"},
        }

    def _is_there(self, name: str) -> bool:
        command = COMMANDS[name]
        return "{out}" not in command.arguments or self.path(name).exists()

    def _run(self, name: str) -> Done:
        arguments, command = self.arguments(name), COMMANDS[name]
        result, printed, log = (
            self.folder / f"{name}.{end}" for end in ("measured.json", "stdout", "stderr")
        )
        launch = [sys.executable, str(Path(__file__).with_name("launch.py")), str(result)]
        with open(printed, "w") as out, open(log, "w") as err:
            process = subprocess.Popen(
                [*launch, sys.executable, "-m", "camera", *arguments],
                cwd=self.folder, env=self.environment(), stdout=out, stderr=err, start_new_session=True,
            )  # fmt: skip
            try:
                process.wait(_LIMIT_S)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        bound = command.bound_gb * 1e9 + (size_bytes(self.path(command.beside)) if command.beside else 0)
        return Done(
            name,
            f"camera {' '.join(command.words)}",
            self.path(name),
            printed=printed.read_text(),
            log=log.read_text()[-_TAIL:],
            bound_bytes=bound,
            **json.loads(result.read_text()),
        )


def size_bytes(path: Path) -> int:
    """Of the weights of a folder, or of a file."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.glob("*.safetensors")))
