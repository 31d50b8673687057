"""Every command that takes a device, on card 1 of three: no fall-back to the CPU, its results, and nothing on another card."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from camera.checkpoints.safetensors_file import read_tensors
from camera.formats.gguf_reader import open_gguf
from camera.formats.quantized_model import QuantizedModel
from tests.camera.evaluation.conftest import arc_rows, write_rows
from tests.forked import run_forked
from tests.npu.process import OnNpu, Outcome
from tests.tiny import tiny_checkpoint, tiny_moe_checkpoint

TEXT = "".join(
    f"{number}. The keeper climbed the narrow stairs each evening to light the great lamp above the sea, and ships "
    f"far away would see {number * 7 % 97} bright signals. "
    for number in range(120)
)
CARDS = {"STUB_CARDS": "3"}
OUT = "OUT"
"""Stands in a command for what it makes."""


@dataclass(frozen=True)
class Both:
    """Runs a command on the CPU and on an NPU."""

    folder: Path
    on_npu: OnNpu

    def __call__(self, *words: str | Path) -> tuple[Outcome, Path, Path]:
        """What it did on the NPU, and what it made: there, and on the CPU.

        Only card 1 was touched, or the test fails.
        """
        cpu, npu = self.folder / "cpu", self.folder / "npu"
        environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = run_forked(tuple(_words(words, cpu, "cpu")), self.folder, environment)
        assert done.returncode == 0, done.stderr
        (self.folder / "cpu.out").write_text(done.stdout)
        outcome = self.on_npu(_words(words, npu, "npu:1"), environment=CARDS)
        assert outcome.cards == {1}
        assert outcome.launches(), "nothing was computed on the NPU"
        return outcome, npu, cpu

    def measured(self, *words: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a command measured as JSON, there and on the CPU."""
        outcome, _, _ = self(*words, "--json")
        return _json(outcome.output), _json((self.folder / "cpu.out").read_text())


def _words(words: Sequence[str | Path], out: Path, device: str) -> list[str]:
    return [*(str(out) if word == OUT else str(word) for word in words), "--device", device]


def _json(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text[text.index("{") :])
    return found


@pytest.fixture
def both(on_npu: OnNpu, tmp_path: Path) -> Both:
    return Both(tmp_path, on_npu)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "dense": tiny_checkpoint(folder / "dense", "PanguEmbedded", hidden=128, ffn=192),
        "experts": tiny_moe_checkpoint(folder / "experts", "qwen2_moe"),
        "bf16": tiny_checkpoint(folder / "bf16", "PanguEmbedded", hidden=128, ffn=192, dtype=torch.bfloat16),
    }


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def calibration(text: Path) -> list[str]:
    return ["--calibration", str(text), "--samples", "20", "--length", "48"]


def same(npu: Path, cpu: Path, tolerance: float) -> None:
    """Two safetensors files hold the same numbers, whole numbers exactly."""
    found, expected = read_tensors(npu), read_tensors(cpu)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape, name
        torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("model", ["dense", "experts"])
def test_capture_gathers_the_statistics_of_the_cpu(
    both: Both, models: dict[str, Path], calibration: list[str], model: str
) -> None:
    _, npu, cpu = both("capture", models[model], OUT, *calibration)
    same(npu / "statistics.safetensors", cpu / "statistics.safetensors", 1e-3)


PRUNING = {
    "camera": [],
    "one-shot": ["--propagate", "one-shot"],
    "refit": ["--method", "refit"],
    "obs": ["--method", "obs"],
    "sparse": ["--method", "refit", "--sparsity", "0.3", "--propagate", "one-shot"],
    "mask": ["--mode", "mask"],
}


@pytest.mark.parametrize("how", PRUNING)
def test_prune_keeps_the_channels_of_the_cpu(
    both: Both, models: dict[str, Path], calibration: list[str], how: str
) -> None:
    words = ["--ratio", "0.4", "--multiple-of", "32", *PRUNING[how]]
    outcome, npu, cpu = both("prune", models["dense"], OUT, *calibration, *words)
    assert "fell back" not in outcome.output + outcome.errors
    same(npu / "model.safetensors", cpu / "model.safetensors", 1e-2)


@pytest.mark.parametrize("how", [["--experts", "0.25"], ["--experts", "auto"], ["--method", "refit"]])
def test_prune_keeps_the_experts_of_the_cpu(
    both: Both, models: dict[str, Path], calibration: list[str], how: list[str]
) -> None:
    words = ["--ratio", "0.4", "--multiple-of", "16", *how]
    _, npu, cpu = both("prune", models["experts"], OUT, *calibration, *words)
    same(npu / "model.safetensors", cpu / "model.safetensors", 1e-2)


@pytest.mark.parametrize("type", ["q4_0_64", "q4_0", "q8_0"])
def test_quantize_packs_the_bytes_of_the_cpu_on_the_npu(
    both: Both, models: dict[str, Path], type: str
) -> None:
    outcome, npu, cpu = both("quantize", models["bf16"], OUT, "--type", type)
    assert "is packed on the CPU" not in outcome.errors
    assert shared(npu, cpu) == 1


CALIBRATED = {
    "search": (["--method", "search", "--type", "q4_0"], 0.99),
    "gptq": (["--method", "gptq"], 0.8),  # a tie that falls the other way moves all that is rounded after it
    "target": (["--type", "q4_0", "--target-bpw", "6"], 1),
}


@pytest.mark.parametrize("how", CALIBRATED)
def test_quantize_calibrates_as_on_the_cpu(
    both: Both, models: dict[str, Path], calibration: list[str], how: str
) -> None:
    words, least = CALIBRATED[how]
    _, npu, cpu = both("quantize", models["dense"], OUT, *calibration, *words)
    assert shared(npu, cpu) >= least


def shared(npu: Path, cpu: Path) -> float:
    """The share of bytes that are the same in two folders of packed tensors of the same types."""
    found, expected = QuantizedModel.open(npu), QuantizedModel.open(cpu)
    assert {name: one.type for name, one in found.tensors.items()} == {
        name: one.type for name, one in expected.tensors.items()
    }
    pairs = [(found.packed(name), expected.packed(name)) for name in expected.tensors]
    return float(sum((one == other).sum() for one, other in pairs) / sum(other.size for _, other in pairs))


def test_imatrix_measures_what_the_cpu_does(
    both: Both, models: dict[str, Path], calibration: list[str]
) -> None:
    _, npu, cpu = both("imatrix", models["dense"], OUT, *calibration)
    found, expected = open_gguf(npu), open_gguf(cpu)
    assert found.tensors.keys() == expected.tensors.keys()
    for name in expected.tensors:
        torch.testing.assert_close(
            found.dequantize(name), expected.dequantize(name), rtol=1e-3, atol=1e-3, msg=name
        )


@pytest.mark.parametrize("how", [[], ["--layer-by-layer"], ["--dtype", "bfloat16"]])
def test_evaluate_measures_the_perplexity_of_the_cpu(
    both: Both, models: dict[str, Path], text: Path, how: list[str]
) -> None:
    words = ("--text", text, "--window", "64", "--max-windows", "6", *how)
    found, expected = both.measured("evaluate", models["dense"], *words)
    assert found["device"] == "npu:1"
    assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=2e-3)


def test_evaluate_measures_the_divergence_of_the_cpu(both: Both, models: dict[str, Path], text: Path) -> None:
    words = ("--text", text, "--window", "64", "--max-windows", "6", "--reference", models["dense"])
    found, expected = both.measured("evaluate", models["bf16"], *words, "--dtype", "float32")
    assert found["divergence"]["divergence"] == pytest.approx(expected["divergence"]["divergence"], rel=0.05)


def test_evaluate_answers_tasks_as_on_the_cpu(both: Both, models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    write_rows(tmp_path / "tasks" / "arc_easy.test.jsonl", arc_rows(12))
    words = ("--tasks", "arc_easy", "--task-folder", tmp_path / "tasks")
    found, expected = both.measured("evaluate", models["dense"], *words)
    assert found["tasks"] == expected["tasks"]


def test_bench_times_the_torch_engine(both: Both, models: dict[str, Path]) -> None:
    found, _ = both.measured("bench", models["bf16"], "--decode", "6", "--repeats", "1")
    (row,) = found["rows"]
    assert row["failure"] is None
    assert found["bandwidth_measured_by"].startswith("copies of ")


def test_a_recipe_runs_whole(on_npu: OnNpu, models: dict[str, Path], text: Path, tmp_path: Path) -> None:
    recipe = {
        "name": "tiny",
        "model": str(models["bf16"]),
        "calibration": {"name": "file", "path": str(text), "samples": 20, "length": 48},
        "capture": {"device": "npu:1"},
        "prune": {"ratio": 0.4, "method": "refit", "multiple_of": 64},
        "quantize": {"device": "npu:1"},
        "evaluate": {
            "datasets": [{"name": "file", "path": str(text)}],
            "window": 64,
            "max_windows": 2,
            "device": "npu:1",
        },
        "benchmark": {"decode": [4], "repeats": 1, "device": "npu:1"},
        "tracking": {"enabled": False},
        "publish": {"folder": str(tmp_path / "published"), "dvc": False},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    environment = {**CARDS, "CAMERA_HOME": str(tmp_path / "home")}
    words = ["run", str(tmp_path / "recipe.yaml"), "--no-prefect"]
    done = on_npu(words, environment=environment, time_out=1200)
    assert done.cards == {1}
    assert list((tmp_path / "published").rglob("*.gguf"))
