"""What a stranger's folder costs, seen from outside: words, exit code 2, a minute and a gigabyte at most; and signals are obeyed."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from camera.checkpoints.checkpoint import Checkpoint
from camera.files import read_json
from camera.formats.quantized_model import SUMMARY_NAME
from camera.options import QuantizeOptions
from camera.quantization.execute import quantize_checkpoint
from tests.faults.conftest import Project, lay_out
from tests.faults.test_networks import environment
from tests.tiny import tiny_checkpoint

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

SECONDS = 60
USUAL_MEMORY = 900 << 20
"""What a command has once torch and transformers are loaded."""


@dataclass(frozen=True)
class Ended:
    code: int
    said: str
    seconds: float
    """Of computing: what else the machine does is not its fault."""
    memory: int
    """The most that the command or a child of it had at once, in bytes."""


def camera(folder: Path, *arguments: object) -> Ended:
    """Run a command; no process of it may take 12 GB, whatever happens."""
    said = folder / "said"
    with said.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "camera", *map(str, arguments)],
            cwd=folder,
            env=environment(),
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30)),
        )
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = used.ru_utime + used.ru_stime
    return Ended(process.returncode, said.read_text(errors="replace"), seconds, used.ru_maxrss << 10)


def refused(told: Ended) -> None:
    sys.stdout.write(f"{told.seconds:.0f} s, {told.memory / 1e9:.2f} GB: {told.said.strip()[-200:]}\n")
    assert told.code == 2, told.said
    assert "Traceback" not in told.said
    assert told.seconds < SECONDS
    assert told.memory < USUAL_MEMORY + (1 << 30)


def run(project: Project, *more: str) -> Ended:
    return camera(project.folder, "run", "recipe.yaml", "--no-prefect", *more)


MULTIPLIES = {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 10}
TWICE = [{"Sequence": {"id": "A", "type_id": 0}}] * 5000
FORGERIES: dict[str, dict[str, Any]] = {
    "normaliser": {"normalizer": {"type": "Sequence", "normalizers": [MULTIPLIES] * 9}},
    "template": {
        "post_processor": {"type": "TemplateProcessing", "single": TWICE, "pair": TWICE, "special_tokens": {}}
    },
    "pattern": {
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": r"([a-z ]+[a-z ]+)+\d"},
            "behavior": "Isolated",
            "invert": False,
        }
    },
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_tokenizer_made_to_harm_ends_one_command_in_words(tmp_path: Path, name: str) -> None:
    # Of a Qwen2 model transformers makes the parts itself, whatever the file says.
    folder, other = (tiny_checkpoint(tmp_path / each, each, layers=1) for each in ("llama", "qwen2"))
    (folder / "tokenizer.model").unlink()
    form = read_json(other / "tokenizer.json")
    (folder / "tokenizer.json").write_text(json.dumps({**form, **FORGERIES[name]}))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (tmp_path / "a.txt").write_text("the keeper climbed the stairs to the lamp " * 500)
    refused(camera(tmp_path, "evaluate", "llama", "--text", "a.txt", "--device", "cpu"))


def grown(path: Path, change: Callable[[Any], Any]) -> None:
    path.write_text(json.dumps(change(read_json(path))))


def test_a_billion_layers_are_refused_in_a_checkpoint_and_in_a_packed_folder(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model", "llama", layers=1)
    quantize_checkpoint(Checkpoint.open(model), tmp_path / "packed", QuantizeOptions(type="q4_0"))
    assert (tmp_path / "packed" / SUMMARY_NAME).is_file()
    for folder in ("model", "packed"):
        grown(tmp_path / folder / "config.json", lambda config: {**config, "num_hidden_layers": 10**9})
    refused(camera(tmp_path, "quantize", "model", "out", "--type", "q4_0"))
    refused(camera(tmp_path, "convert", "packed", "out.gguf"))
    refused(camera(tmp_path, "evaluate", "packed", "--device", "cpu"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_tokenises_a_long_text_ends_within_seconds_and_goes_on_later(
    tmp_path: Path, model: Path, number: signal.Signals
) -> None:
    project = lay_out(tmp_path / "project", model)
    short = (project.folder / "held-out.txt").read_text()
    (project.folder / "held-out.txt").write_text(short * ((12 << 20) // len(short)))
    process = subprocess.Popen(
        [sys.executable, "-m", "camera", "run", "recipe.yaml", "--no-prefect"],
        cwd=project.folder,
        env=environment(PYTHONUNBUFFERED="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    while not (line := process.stdout.readline()).startswith("running  fetch held-out"):
        assert line, "it ended before"
    time.sleep(2)
    begun = time.monotonic()
    process.send_signal(number)
    assert process.wait(timeout=60) == 130
    assert time.monotonic() - begun < 5
    assert "run the same command again" in process.stdout.read()
    process.stdout.close()
    (project.folder / "held-out.txt").write_text(short)
    assert run(project).code == 0
