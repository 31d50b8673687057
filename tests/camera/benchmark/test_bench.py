import importlib.metadata
import json
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import pytest
import torch

from camera.benchmark import bench as module
from camera.benchmark.bench import BenchModel, run_benchmark
from camera.benchmark.report import BenchmarkReport, BenchmarkRow
from camera.devices import Bandwidth
from camera.engines import ENGINES, Engine, Footprint, Timing
from camera.errors import CameraError
from camera.options import BenchmarkOptions
from tests.tiny import tiny_checkpoint

SHORT = BenchmarkOptions(decode=(8, 24), repeats=3, device="cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("bench")
    return [tiny_checkpoint(folder / "whole"), tiny_checkpoint(folder / "pruned", ffn=64)]


def models(folders: Sequence[Path]) -> list[BenchModel]:
    return [
        BenchModel(label="whole", path=folders[0], baseline=True),
        *(BenchModel(label=path.name, path=path) for path in folders[1:]),
    ]


def row(report: BenchmarkReport, model: str, decode: int) -> BenchmarkRow:
    return next(row for row in report.rows if (row.model, row.decode) == (model, decode))


class ScriptedEngine(Engine):
    """An engine whose clock is a script: decode costs `ms` per token, a different one in each run."""

    in_torch = True
    positions = 512
    order: ClassVar[list[str]] = []

    def __init__(self, path: Path) -> None:
        self.path, self.runs = path, 0

    @classmethod
    def load(cls, path: Path, options: BenchmarkOptions, device: torch.device) -> Self:
        return cls(path)

    @classmethod
    def build(cls, options: BenchmarkOptions) -> str:
        return "a script"

    def time_once(self, prompt: int, decode: Sequence[int]) -> Timing:
        self.order.append(self.path.name)
        script = [float(ms) for ms in self.path.name.split("-")]
        ms = script[max(self.runs - 1, 0)]  # run 0 is the warm-up
        self.runs += 1
        return Timing(prompt * ms / 500, {length: length * ms / 1000 for length in decode})

    def footprint(self) -> Footprint:
        return Footprint(1000, 2000, 3000, 10**9, 1000)

    def describe(self) -> dict[str, Any]:
        return {"script": self.path.name}

    def close(self) -> None:
        pass


@pytest.fixture
def known_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares the measurement, which takes longer than the tiny models."""
    monkeypatch.setattr(module, "memory_bandwidth", lambda device: Bandwidth(1e12, "known"))


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch, known_bandwidth: None) -> type[ScriptedEngine]:
    ScriptedEngine.order = []
    list(ENGINES)  # found before one of them is replaced
    monkeypatch.setitem(ENGINES._entries, "torch", ScriptedEngine)
    return ScriptedEngine


def test_a_report_has_a_row_for_each_model_and_length_and_is_plain_json(folders: list[Path]) -> None:
    report = run_benchmark(models(folders), SHORT)
    assert [(row.model, row.decode) for row in report.rows] == [
        ("whole", 8),
        ("whole", 24),
        ("pruned", 8),
        ("pruned", 24),
    ]
    for measured in report.rows:
        assert measured.failure is None
        assert len(measured.decode_ms.samples) == len(measured.prefill_ms.samples) == 3
        assert measured.tokens_per_second == pytest.approx(1000 / measured.decode_ms.median)
    text = json.dumps(report.model_dump(mode="json"), allow_nan=False)
    assert BenchmarkReport.model_validate_json(text) == report
    assert report.baseline == "whole"
    assert report.device["kind"] == "cpu"
    assert report.versions["torch"] == importlib.metadata.version(
        "torch"
    )  # a build may call itself 2.10.0+cu128
    assert report.engines["torch: pruned"]["dtype"] == "float32"
    assert 1e8 < report.bandwidth_bytes_per_second < 1e13
    assert report.bandwidth_measured_by.startswith("sums of")
    assert row(report, "pruned", 8).bytes_per_token < row(report, "whole", 8).bytes_per_token


@pytest.mark.usefixtures("known_bandwidth")
def test_4_bit_files_are_timed_by_both_engines(llama_cpp: Path, ggufs: dict[str, Path]) -> None:
    timed = [
        BenchModel(label="Q4_0", path=ggufs["q4_0"], baseline=True),
        BenchModel(label="Q4_0_64", path=ggufs["q4_0_64"]),
    ]
    options = SHORT.model_copy(update={"engines": ("torch", "llama.cpp"), "llama_cpp": llama_cpp})
    report = run_benchmark(timed, options)
    by_engine = {(row.engine, row.model): row for row in report.rows if row.decode == 24}
    assert by_engine["torch", "Q4_0"].decode_speedup == 1
    assert by_engine["torch", "Q4_0_64"].decode_speedup > 0
    assert by_engine["llama.cpp", "Q4_0"].decode_ms.median == pytest.approx(2)
    assert by_engine["llama.cpp", "Q4_0"].prefill_ms.median == pytest.approx(1)
    assert by_engine["llama.cpp", "Q4_0"].stand_in is None
    twin = by_engine["llama.cpp", "Q4_0_64"]
    assert (twin.failure, twin.stand_in) == (None, "its Q4_0 twin: the build does not read Q4_0_64")
    assert "expected 46080" in report.engines["llama.cpp: Q4_0_64"]["why_twin"]
    assert twin.model_bytes > by_engine["torch", "Q4_0_64"].model_bytes
    assert by_engine["torch", "Q4_0_64"].stand_in is None
    kernels = report.engines["torch: Q4_0_64"]["linears"]
    assert kernels == {"q4_0_64 by aten::_weight_int4pack_mm_for_cpu": 15}


def test_runs_alternate_and_turn_round(scripted: type[ScriptedEngine], tmp_path: Path) -> None:
    run_benchmark(models([tmp_path / "1-1-1", tmp_path / "2-2-2"]), SHORT)
    warm_up, timed = scripted.order[:2], scripted.order[2:]
    assert warm_up == ["1-1-1", "2-2-2"]
    assert timed == ["1-1-1", "2-2-2", "2-2-2", "1-1-1", "1-1-1", "2-2-2"]


def test_medians_spreads_and_ratios(scripted: type[ScriptedEngine], tmp_path: Path) -> None:
    report = run_benchmark(models([tmp_path / "4-4.2-4.1", tmp_path / "3-2-1.5"]), SHORT)
    whole, pruned = row(report, "whole", 24), row(report, "3-2-1.5", 24)
    assert (whole.decode_ms.median, whole.decode_ms.low, whole.decode_ms.high) == pytest.approx((4.1, 4, 4.2))
    assert whole.prefill_ms.median == pytest.approx(8.2)
    assert whole.decode_speedup == 1
    assert pruned.decode_speedup == pytest.approx(4.1 / 2)
    assert pruned.prefill_speedup == pytest.approx(4.1 / 2)
    assert (whole.noisy, pruned.noisy) == (False, True)
    assert whole.bytes_per_token == 10**9 + 1000 * (4 + 12.5)
    assert whole.bandwidth_share == pytest.approx(whole.bytes_per_token / 4.1e-3 / 1e12)


@pytest.mark.usefixtures("known_bandwidth")
def test_a_model_that_cannot_be_loaded_is_a_row_with_its_reason(folders: list[Path], tmp_path: Path) -> None:
    report = run_benchmark(models([folders[0], tmp_path / "gone"]), SHORT)
    assert row(report, "whole", 8).failure is None
    assert "gone is not a folder" in row(report, "gone", 8).failure
    assert row(report, "gone", 8).decode_ms is None


@pytest.mark.usefixtures("known_bandwidth")
def test_lengths_beyond_the_models_positions_are_rows_with_their_reason(folders: list[Path]) -> None:
    options = SHORT.model_copy(update={"decode": (8, 509), "repeats": 1})
    report = run_benchmark(models(folders[:1]), options)
    assert row(report, "whole", 8).failure is None
    assert row(report, "whole", 509).failure == "4 + 509 tokens are more than the model's 512 positions"


@pytest.mark.usefixtures("known_bandwidth")
def test_the_last_position_can_be_used(folders: list[Path]) -> None:
    report = run_benchmark(models(folders[:1]), SHORT.model_copy(update={"decode": (508,), "repeats": 1}))
    assert row(report, "whole", 508).failure is None


@pytest.mark.usefixtures("known_bandwidth")
def test_an_engine_that_is_missing_does_not_stop_the_others(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    report = run_benchmark(
        models(folders), SHORT.model_copy(update={"engines": ("llama.cpp", "torch"), "decode": (8,)})
    )
    failures = {row.engine: row.failure for row in report.rows}
    assert "llama-bench is not on PATH" in failures["llama.cpp"]
    assert failures["torch"] is None


def test_a_model_that_fails_in_a_run_keeps_the_reason(
    scripted: type[ScriptedEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(self: ScriptedEngine, prompt: int, decode: Sequence[int]) -> Timing:
        raise torch.OutOfMemoryError("out of memory")

    run_once = ScriptedEngine.time_once
    monkeypatch.setattr(
        ScriptedEngine,
        "time_once",
        lambda self, *args: (exhausted if self.path.name == "2" and self.runs == 0 else run_once)(
            self, *args
        ),
    )
    report = run_benchmark(models([tmp_path / "1-1-1", tmp_path / "2"]), SHORT)
    assert row(report, "2", 8).failure == "out of memory"
    assert row(report, "whole", 8).failure is None


def test_the_failure_of_an_npu_is_a_row_that_names_its_cause(
    scripted: type[ScriptedEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: ScriptedEngine, prompt: int, decode: Sequence[int]) -> Timing:
        raise RuntimeError("NPU function error: aclrtSynchronizeStream, error code is 507015")

    monkeypatch.setattr(ScriptedEngine, "time_once", failing)
    failure = row(run_benchmark(models([tmp_path / "1-1-1"]), SHORT), "whole", 8).failure or ""
    assert failure.startswith("the device threw an exception in an operator")
    assert failure.endswith("error code is 507015)")


def test_threads_are_given_back(scripted: type[ScriptedEngine], tmp_path: Path) -> None:
    before = torch.get_num_threads()
    report = run_benchmark(models([tmp_path / "1-1-1"]), SHORT.model_copy(update={"threads": before + 1}))
    assert report.device["threads"] == before + 1
    assert torch.get_num_threads() == before


def test_progress_counts_runs(scripted: type[ScriptedEngine], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    run_benchmark(
        models([tmp_path / "1-1-1", tmp_path / "2-2-2"]),
        SHORT,
        lambda done, total: seen.append((done, total)),
    )
    assert seen == [(done, 6) for done in range(1, 7)]


@pytest.mark.parametrize(
    ("labels", "baselines", "message"),
    [
        ([], [], "no model"),
        (["a", "a"], [False, False], "same label"),
        (["a", "b"], [True, True], "baseline"),
    ],
)
def test_a_question_without_an_answer_is_refused(
    labels: list[str], baselines: list[bool], message: str
) -> None:
    asked = [
        BenchModel(label=label, path=Path("x"), baseline=baseline)
        for label, baseline in zip(labels, baselines, strict=True)
    ]
    with pytest.raises(CameraError, match=message):
        run_benchmark(asked, SHORT)


def test_a_model_may_be_of_some_engines_only(folders: list[Path]) -> None:
    options = BenchmarkOptions(decode=(4,), repeats=1, device="cpu", engines=("llama.cpp", "torch"))
    only = BenchModel(label="whole", path=folders[0], engines=("torch",))
    seen: list[tuple[int, int]] = []
    report = run_benchmark([only], options, lambda done, total: seen.append((done, total)))
    assert [(row.engine, row.failure) for row in report.rows] == [("torch", None)]
    assert seen == [(1, 1)]


@pytest.mark.usefixtures("known_bandwidth")
def test_times_that_would_be_false_are_not_measured(
    npu: types.ModuleType, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASCEND_LAUNCH_BLOCKING", "1")
    with pytest.raises(CameraError, match="ASCEND_LAUNCH_BLOCKING is set"):
        run_benchmark(models(folders), SHORT.model_copy(update={"device": "npu"}))
