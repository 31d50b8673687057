"""GGUF files of a tiny model, and a folder with a program that stands for llama-bench."""

import sys
from pathlib import Path

import pytest

from camera.checkpoints.checkpoint import Checkpoint
from camera.formats.convert import convert_to_gguf
from camera.options import QuantizeOptions
from camera.quantization.execute import quantize_checkpoint
from tests.tiny import tiny_checkpoint


@pytest.fixture(scope="session")
def ggufs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same tiny openPangu as Q4_0 and Q4_0_64; 512 positions."""
    folder = tmp_path_factory.mktemp("ggufs")
    source = Checkpoint.open(tiny_checkpoint(folder / "model", "PanguEmbedded", hidden=128, vocab=384))
    made = {}
    for kind in ("q4_0", "q4_0_64"):
        quantize_checkpoint(source, folder / kind, QuantizeOptions(type=kind))
        convert_to_gguf(folder / kind, folder / f"{kind}.gguf", name="tiny")
        made[kind] = folder / f"{kind}.gguf"
    return made


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a build answered is kept for this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like that of a llama.cpp build; the program in it logs its arguments to `calls.jsonl` beside it."""
    monkeypatch.setenv("FAKE_LLAMA_BENCH_LOG", str(tmp_path / "calls.jsonl"))
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    put_program(tmp_path / "llama.cpp", "llama-bench", "fake_llama_bench.py")
    return tmp_path / "llama.cpp"


def put_program(folder: Path, name: str, script: str) -> None:
    """A program in the build of a folder that runs a script of this one."""
    binary = folder / "build" / "bin" / name
    binary.parent.mkdir(parents=True, exist_ok=True)
    binary.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).with_name(script)} "$@"\n')
    binary.chmod(0o755)
