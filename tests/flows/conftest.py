"""A small project to run the command line in: a tiny openPangu checkpoint, text, and a recipe."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from tests.fake_npu import npu
from tests.forked import run_forked
from tests.tiny import tiny_checkpoint

__all__ = ["npu"]

_TEXT = (
    "the old lighthouse keeper climbed the narrow stairs each evening to light the great lamp above the sea "
    "and ships far away would see the bright signal and turn before they reached the rocks under the water "
    "one night"
)


@dataclass(frozen=True)
class Workplace:
    """A folder in which commands run."""

    folder: Path

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"

    @property
    def store(self) -> Path:
        return self.folder / ".camera" / "store"

    def camera(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run the command line to its end."""
        done = run_forked(arguments, self.folder, self._environment())
        if check:
            assert done.returncode == 0, done.stdout + done.stderr
        return done

    def stop_at(self, line: str, *arguments: str, with_signal: int = signal.SIGKILL) -> int:
        """Run the command line until it prints a line that begins so, then send a signal; the exit code."""
        process = subprocess.Popen(
            self._command(arguments),
            cwd=self.folder,
            env=self._environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        seen = []
        for printed in process.stdout:
            seen.append(printed)
            if printed.startswith(line):
                process.send_signal(with_signal)
                break
        process.stdout.read()
        code = process.wait(timeout=120)
        assert any(printed.startswith(line) for printed in seen), "".join(seen)
        return code

    def _command(self, arguments: tuple[str, ...]) -> list[str]:
        return [sys.executable, "-m", "camera", *arguments]

    def _environment(self) -> dict[str, str]:
        ours = ("PREFECT_", "MLFLOW_", "CAMERA_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        root = str(Path(__file__).parents[2])
        return {**kept, "PYTHONPATH": root, "COLUMNS": "160", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random openPangu checkpoint in bf16, in two shards."""
    return tiny_checkpoint(
        tmp_path_factory.mktemp("model") / "tiny", "PanguEmbedded", shards=2, dtype=torch.bfloat16
    )


@pytest.fixture
def workplace(tmp_path: Path, tiny_model: Path) -> Workplace:
    """A project folder with model, text and recipe."""
    (tmp_path / "model").symlink_to(tiny_model)
    write_text(tmp_path / "calibration.txt", 4000, 1)
    write_text(tmp_path / "held-out.txt", 800, 2)
    recipe = {
        "name": "tiny",
        "model": "model",
        "calibration": {"name": "file", "path": "calibration.txt", "samples": 4, "length": 64},
        "capture": {"dtype": "float32", "batch_size": 2},
        "prune": {"ratio": 0.4},
        "quantize": {"twin": "q4_0"},
        "evaluate": {
            "datasets": [{"name": "file", "path": "held-out.txt"}],
            "window": 64,
            "max_windows": 4,
            "dtype": "float32",
        },
        "benchmark": {"decode": [8], "repeats": 2},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return Workplace(tmp_path)


def write_text(path: Path, words: int, step: int) -> None:
    """Text that repeats itself late enough for windows to differ."""
    known = _TEXT.split()
    path.write_text(" ".join(known[(index * step + index // 7) % len(known)] for index in range(words)))


@pytest.fixture
def states() -> Callable[[str], dict[str, str]]:
    """Read the plain lines of a run: what became of each step."""

    def read(output: str) -> dict[str, str]:
        found: dict[str, str] = {}
        for line in output.splitlines():
            state, _, rest = line.partition(" ")
            if state in ("cached", "done"):
                found[
                    rest.strip().rpartition(" (")[0].rpartition(" in ")[0] or rest.strip().rpartition(" (")[0]
                ] = state
        return found

    return read


def flip_a_bit(path: Path) -> None:
    """Damage a file as something does that does not ask: same size, one bit."""
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
