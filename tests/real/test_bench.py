"""Decoding, against transformers' own layers with the numbers that the blocks stand for."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import REPOSITORY
from tests.real.checkpoint import WIDTH
from tests.real.plain import log_probabilities, reader
from tests.real.test_quantize import MATRICES, Packed
from tests.real.workshop import Done, Workshop, size_bytes

pytestmark = pytest.mark.real
Run = Callable[[str], Done]
PROMPT = (1, 747, 683, 906, 4343, 328, 7249, 906)
STEPS = 4
_ENGINE = """
import json, sys, torch
from pathlib import Path
from camera.engines.torch_engine import TorchEngine
engine = TorchEngine(Path(sys.argv[1]), torch.device("cpu"), 64)
logits = engine.prefill(json.loads(sys.argv[2]))
print(json.dumps([bool(torch.isfinite(logits).all()), engine.decode(int(sys.argv[3])).tolist()]))
"""


def shortfall(packed: Packed, model: Path, tokens: list[int]) -> float:
    """How much less likely than the likeliest the worst of the tokens chosen after the prompt is, in nats."""
    source = reader(model)

    def stored(name: str) -> torch.Tensor:
        return torch.from_numpy(packed.numbers(name)).bfloat16() if name in MATRICES else source(name)

    log_p_TV = log_probabilities(stored, WIDTH, torch.tensor([*PROMPT, *tokens]), torch.bfloat16)
    chosen_TV = log_p_TV[len(PROMPT) - 1 : -1]
    return float((chosen_TV.amax(1) - chosen_TV.gather(1, torch.tensor(tokens)[:, None])[:, 0]).max())


def assert_measured(done: Done, size: int, rows: int = 1) -> None:
    report = done.json
    assert len(report["rows"]) == rows
    for row in report["rows"]:
        assert row["failure"] is None
        assert row["decode_ms"]["median"] > 0
        assert row["prefill_ms"]["median"] > 0
        assert row["model_bytes"] == pytest.approx(size, rel=1e-3)


def test_the_torch_engine_holds_little_more_than_the_packed_model_and_reads_less(run: Run):
    gguf = run("convert").out
    done = run("bench")
    assert_measured(done, size_bytes(gguf))
    (row,) = done.json["rows"]
    assert row["bytes_per_token"] < row["held_bytes"]


def test_the_torch_engine_runs_a_checkpoint(run: Run):
    pruned = run("prune").out
    assert_measured(run("bench-bf16"), size_bytes(pruned))


def test_the_torch_engine_decodes_what_the_stored_numbers_compute(run: Run, model: Path, workshop: Workshop):
    done = subprocess.run(
        [sys.executable, "-c", _ENGINE, str(run("convert").out), json.dumps(PROMPT), str(STEPS)],
        capture_output=True, text=True, env=workshop.environment(), cwd=REPOSITORY, check=True,
    )  # fmt: skip
    finite, tokens = json.loads(done.stdout)
    assert finite
    assert shortfall(Packed(run("quantize").out), model, tokens) < 0.1


def test_llama_cpp_loads_the_twin_and_decodes_the_same(run: Run, model: Path, workshop: Workshop):
    pytest.importorskip("xllamacpp", reason="the extra `llama` is not installed")
    from tests.camera.formats.test_real_llama_cpp import greedy

    run("convert")
    twin = workshop.path("twin")
    assert_measured(run("bench-llama"), size_bytes(twin), rows=2)
    tokens = greedy(twin, PROMPT, STEPS)
    assert len(tokens) == STEPS
    assert shortfall(Packed(run("quantize").out), model, tokens) < 0.5
