import json
import os
import time
from pathlib import Path

import psutil
import pytest

from camera.benchmark.llama_cpp import LlamaCppEngine, find_llama_bench
from camera.errors import CameraError
from camera.formats.gguf_reader import open_gguf
from camera.options import BenchmarkOptions


def options(llama_cpp: Path, **more: object) -> BenchmarkOptions:
    return BenchmarkOptions(engines=("llama.cpp",), llama_cpp=llama_cpp, **more)


def calls(tmp_path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]


def test_the_binary_is_found_in_the_named_folder_then_the_environment_then_the_path(
    llama_cpp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binary = llama_cpp / "build" / "bin" / "llama-bench"
    assert find_llama_bench(llama_cpp) == binary
    monkeypatch.setenv("PATH", str(binary.parent))
    assert find_llama_bench(None) == binary
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("LLAMA_CPP_DIR", str(llama_cpp / "build"))
    assert find_llama_bench(None) == llama_cpp / "build" / "bin" / "llama-bench"


def test_a_missing_binary_says_where_to_name_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(CameraError, match=r"not on PATH: set `llama_cpp` or \$LLAMA_CPP_DIR"):
        find_llama_bench(None)
    with pytest.raises(CameraError, match="holds no llama-bench"):
        find_llama_bench(tmp_path)


def test_one_run_asks_for_one_repeat_and_reads_seconds(
    llama_cpp: Path, tmp_path: Path, ggufs: dict[str, Path]
) -> None:
    engine = LlamaCppEngine(ggufs["q4_0"], options(llama_cpp, threads=3, device="cpu"))
    timing = engine.time_once(4, (32, 16))
    assert timing.prefill_s == pytest.approx(0.004)
    assert timing.decode_s == {16: pytest.approx(0.032), 32: pytest.approx(0.064)}
    assert calls(tmp_path) == [
        {"m": str(ggufs["q4_0"]), "p": "4", "n": "16,32", "r": "1", "o": "json", "t": "3", "ngl": "0"}
    ]


def test_the_build_and_the_settings_of_its_backend_are_recorded(
    llama_cpp: Path, ggufs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GGML_CANN_WEIGHT_NZ", "0")
    engine = LlamaCppEngine(ggufs["q4_0"], options(llama_cpp))
    engine.time_once(4, (16,))
    described = engine.describe()
    assert (described["build_commit"], described["backends"]) == ("abc1234", "CPU")
    assert described["settings"] == {"GGML_CANN_WEIGHT_NZ": "0"}


def test_q4_0_64_is_refused_and_its_twin_suggested(llama_cpp: Path, ggufs: dict[str, Path]) -> None:
    with pytest.raises(CameraError, match=r"is Q4_0_64.*NVFP4.*Q4_0 twin.*llama_cpp_reads_q4_0_64"):
        LlamaCppEngine(ggufs["q4_0_64"], options(llama_cpp))


def test_q4_0_64_runs_on_a_build_that_is_said_to_read_it(llama_cpp: Path, ggufs: dict[str, Path]) -> None:
    engine = LlamaCppEngine(ggufs["q4_0_64"], options(llama_cpp, llama_cpp_reads_q4_0_64=True))
    assert engine.time_once(4, (16,)).decode_s == {16: pytest.approx(0.032)}


def test_a_folder_is_refused(llama_cpp: Path, tmp_path: Path) -> None:
    with pytest.raises(CameraError, match=r"is a folder: llama\.cpp reads GGUF files"):
        LlamaCppEngine(tmp_path, options(llama_cpp))


def test_a_process_that_hangs_is_ended_with_its_children(
    llama_cpp: Path, tmp_path: Path, ggufs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_LLAMA_BENCH", "hang")
    engine = LlamaCppEngine(ggufs["q4_0"], options(llama_cpp, timeout=2))
    start = time.monotonic()
    with pytest.raises(CameraError, match="was ended after 2 s"):
        engine.time_once(4, (16,))
    assert time.monotonic() - start < 10
    child = int((tmp_path / "calls.jsonl").read_text())
    deadline = time.monotonic() + 5
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, f"process {child} still runs"
        time.sleep(0.05)


def test_a_failure_gives_the_last_lines_it_wrote(
    llama_cpp: Path, ggufs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_LLAMA_BENCH", "fail")
    with pytest.raises(CameraError, match=r"(?s)exit code 1.*failed to load model"):
        LlamaCppEngine(ggufs["q4_0"], options(llama_cpp)).time_once(4, (16,))


def test_output_that_is_not_json_is_refused(
    llama_cpp: Path, ggufs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_LLAMA_BENCH", "garbage")
    with pytest.raises(CameraError, match=r"printed something else: '\| model"):
        LlamaCppEngine(ggufs["q4_0"], options(llama_cpp)).time_once(4, (16,))


def test_a_token_reads_all_weights_but_the_embedding(llama_cpp: Path, ggufs: dict[str, Path]) -> None:
    engine = LlamaCppEngine(ggufs["q4_0"], options(llama_cpp))
    engine.time_once(4, (16,))
    found = engine.footprint()
    tensors = open_gguf(ggufs["q4_0"]).tensors
    everything = sum(tensor.data.nbytes for tensor in tensors.values())
    assert found.weight_bytes_per_token == everything - tensors["token_embd.weight"].data.nbytes
    assert found.kv_bytes_per_position == 2 * 2 * 2 * 32 * 2  # keys and values, layers, kv heads, width, f16
    assert found.model_bytes == os.path.getsize(ggufs["q4_0"])
